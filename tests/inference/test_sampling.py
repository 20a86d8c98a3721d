"""Filters against plain definitions, draws against their distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.errors import UserError
from phase2_jax.inference.sampling import Filters, GenerationConfig, choose_token, filter_logits, make_filters

LOGITS = jnp.array([2.0, 0.5, -1.0, 1.0, 0.0])
NOTHING_SEEN = jnp.zeros(5, bool)

_compiled = jax.jit(filter_logits)


def allowed(logits=LOGITS, seen=NOTHING_SEEN, **options: Any) -> list[int]:
    config = GenerationConfig(**{"temperature": 1.0, **options})
    return np.flatnonzero(np.isfinite(_compiled(logits, seen, make_filters(config)))).tolist()


def test_each_filter_leaves_what_it_says():
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum()  # .565 .126 .028 .208 .076
    assert allowed() == [0, 1, 2, 3, 4]
    assert allowed(top_k=2) == [0, 3]
    assert allowed(top_k=9) == [0, 1, 2, 3, 4]
    assert allowed(top_p=0.5) == [0]
    assert allowed(top_p=0.6) == [0, 3]
    assert allowed(top_p=1e-6) == [0]
    assert allowed(min_p=0.2) == np.flatnonzero(probability >= 0.2 * probability.max()).tolist() == [0, 1, 3]
    assert allowed(min_p=1.0) == [0]
    # top_p counts among what top_k left: of .565 and .208 the first is .73.
    assert allowed(top_k=2, top_p=0.7) == [0]
    # A high temperature evens the shares out before they are summed.
    assert allowed(temperature=10.0, top_p=0.5) == [0, 1, 3]


def test_the_repetition_penalty_lowers_what_was_seen():
    seen = jnp.array([True, False, True, False, True])
    result = filter_logits(LOGITS, seen, make_filters(GenerationConfig(temperature=1, repetition_penalty=2)))
    np.testing.assert_array_equal(result, np.array([1.0, 0.5, -2.0, 1.0, 0.0], np.float32))


@given(
    logits=st.lists(st.integers(-40, 40), min_size=5, max_size=5, unique=True),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_filters_against_a_sorted_list(logits, top_k, top_p, min_p):
    logits = np.array(logits) / 8
    ranked = sorted(range(5), key=lambda i: -logits[i])[: top_k or 5]
    weights = np.exp(logits - logits.max())
    total, kept, sum_before = weights[ranked].sum(), [], 0.0
    for index in ranked:
        # Within rounding of the border either answer is right.
        if abs(sum_before / total - top_p) < 1e-5 or abs(weights[index] - min_p) < 1e-5:
            return
        if sum_before / total < top_p and weights[index] >= min_p:
            kept.append(index)
        sum_before += weights[index]
    filters = Filters(jnp.float32(1), jnp.int32(top_k or 5), jnp.float32(top_p), jnp.float32(min_p), None)
    result = np.flatnonzero(np.isfinite(_compiled(logits.astype(np.float32), NOTHING_SEEN, filters)))
    assert result.tolist() == sorted(kept)


def test_draws_follow_the_distribution():
    filters = make_filters(GenerationConfig(temperature=0.5, top_k=3))
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: choose_token(LOGITS, NOTHING_SEEN, key, filters))(keys)
    shares = np.bincount(draws, minlength=5) / 4000
    weights = np.where([True, True, False, True, False], np.exp(LOGITS / 0.5), 0)
    # Four standard deviations of a share of 4,000 draws are at most .032.
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.032)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-44])
def test_a_tiny_temperature_leaves_the_likeliest(temperature):
    filters = make_filters(GenerationConfig(temperature=temperature))
    kept = np.asarray(filter_logits(LOGITS, jnp.zeros(LOGITS.shape, bool), filters))
    assert np.flatnonzero(kept == kept.max()).tolist() == np.flatnonzero(LOGITS.max() == LOGITS).tolist()
    assert not np.isnan(kept).any()


def test_no_temperature_takes_the_likeliest():
    filters = make_filters(GenerationConfig(temperature=0, top_k=2, seed=5))
    assert filters.top_k is None
    assert choose_token(LOGITS, NOTHING_SEEN, jax.random.key(0), filters) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": -1}, "--max_tokens=-1"),
        ({"temperature": -0.1}, "--temperature=-0.1"),
        ({"temperature": float("nan")}, "--temperature=nan"),
        ({"top_k": -1}, "--top_k=-1"),
        ({"top_p": 0.0}, "--top_p=0.0"),
        ({"top_p": 1.5}, "--top_p=1.5"),
        ({"min_p": 2.0}, "--min_p=2.0"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty=0.0"),
        ({"seed": -1}, "--seed=-1"),
        ({"stop": ("a", "")}, "--stop"),
    ],
)
def test_values_out_of_range_are_named(options, said):
    with pytest.raises(UserError, match=said):
        GenerationConfig(**options).validate()
