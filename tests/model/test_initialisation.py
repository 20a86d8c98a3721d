"""A new model: half-lives, parameters, gradients on the first step."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.model.potential import Potential, initial_half_lives
from phase2_jax.training.run_info import warn_of_short_half_lives

LN2 = np.log(2)


def measured_half_lives(config, seq_len: int) -> np.ndarray:
    """From Γ of normed inputs, as a layer would see them; medians over the tokens."""
    x_BxNxD = nnx.LayerNorm(config.d_model, rngs=nnx.Rngs(0))(
        jax.random.normal(jax.random.key(1), (4, 16, config.d_model))
    )
    gamma_BxNxP = Potential(config, seq_len, nnx.Rngs(0)).gamma(x_BxNxD)
    return np.median(LN2 / (gamma_BxNxP * config.dt), axis=(0, 1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # ½·ln2/1e-4 = 3,466 tokens are allowed, the sequence has 512.
        ({"base_decay": 1e-4}, np.geomspace(2, 512, 4)),
        ({"base_decay": 1e-2}, np.geomspace(2, 34.66, 4)),  # the cap of base_decay
        ({"base_decay": 1e-4, "half_life_min": 8.0, "half_life_max": 1000.0}, np.geomspace(8, 1000, 4)),
        ({"base_decay": 1e-4, "dt": 0.25}, np.geomspace(2, 512, 4)),  # in tokens, whatever their distance
        ({"base_decay": 1e-4, "shared_potential": True}, [32]),
        ({"base_decay": 1e-2, "adaptive_decay": False}, [69.3] * 4),
        ({"base_decay": 0.5, "adaptive_decay": False}, [1.386] * 4),
    ],
)
def test_half_lives_as_measured(config, changes, expected):
    config = replace(config, num_heads=4, **changes)
    config.validate()
    # The rate's weights, 0.02 each on 16 inputs of size 1, move Γ by some 8 % from token to token.
    np.testing.assert_allclose(measured_half_lives(config, 512), expected, rtol=0.15)


def test_a_short_sequence_does_not_invert_the_spread(config):
    np.testing.assert_allclose(initial_half_lives(config, 1), [2, 2])


@pytest.mark.parametrize(("base_decay", "message"), [(1e-2, r"from 512 to 35 tokens; at most 0\.00068"), (1e-4, None)])
def test_a_shortened_half_life_warns(config, base_decay, message):
    run: Any = SimpleNamespace(
        model_config=replace(config, base_decay=base_decay), config=SimpleNamespace(train=SimpleNamespace(seq_len=512))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_short_half_lives(run)
    if message is None:
        assert not caught
    else:
        with pytest.warns(UserWarning, match=message):
            warn_of_short_half_lives(run)


@pytest.mark.parametrize(("num_layers", "shape"), [(1, None), (2, (1, 8, 6)), (3, (2, 8, 6))])
def test_the_last_layer_feeds_nothing_back(config, num_layers, shape):
    config = replace(config, num_layers=num_layers, value_dim=6)
    model = nnx.eval_shape(lambda: LanguageModel(config, seq_len=12, rngs=nnx.Rngs(0)))
    assert (None if model.feedback is None else model.feedback.shape) == shape


@pytest.mark.parametrize("changes", [{"memory": False}, {"resolvent": False}, {"memory_feedback": False}])
def test_no_feedback_matrix_without_its_reader_or_its_writer(config, changes):
    model = nnx.eval_shape(lambda: LanguageModel(replace(config, **changes), seq_len=12, rngs=nnx.Rngs(0)))
    assert model.feedback is None


EVERYTHING = {
    "resolvent_gamma": "own",
    "zeta_init": True,
    "position_embedding": "zeta",
    "tie_embeddings": True,
    "value_dim": 6,
    "remat": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        EVERYTHING,
        {"bk_mode": "bidirectional", "encoder": True},
        {"dtype": "bfloat16", "shared_potential": True},
    ],
    ids=["default", "everything", "bidirectional", "bfloat16"],
)
def test_every_parameter_has_a_gradient_on_the_first_step(config, loss_of, changes):
    config = replace(config, **changes)
    graphdef, params = nnx.split(LanguageModel(config, seq_len=16, rngs=nnx.Rngs(0)))
    # All tokens of the vocabulary occur, so that each row of the embedding is used.
    tokens = jnp.asarray(np.random.default_rng(0).permutation(np.arange(32) % 11).reshape(4, 8).astype(np.int32))

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _, _ = nnx.merge(graphdef, params)(tokens, init_state(config, 4), aligned=True)
        return loss_of(logits, tokens)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        # Stacked layers: no layer may be dead.
        layers = leaf if name.startswith("['blocks']") else leaf[None]
        norms = np.linalg.norm(np.reshape(layers, (len(layers), -1)), axis=1)
        assert np.all(norms > 1e-7), f"{name}: {norms}"
