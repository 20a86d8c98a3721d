"""The short causal convolution with its SiLU against a loop over tokens, and its gradient against differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from phase2_jax.memory.convolution import causal_convolution

B, C = 2, 3


def by_hand(x_BxNxC, taps_TxC, tail_BxSxC, reset_BxN):
    y, tails = np.zeros_like(x_BxNxC), []
    for row in range(len(x_BxNxC)):
        past = list(tail_BxSxC[row])
        for t, x_C in enumerate(x_BxNxC[row]):
            if reset_BxN[row, t]:
                past = [np.zeros_like(x_C) for _ in past]
            newest_first = [x_C, *past[::-1]]
            c_C = sum(tap_C * x_C for tap_C, x_C in zip(taps_TxC, newest_first, strict=True))
            y[row, t] = c_C / (1 + np.exp(-c_C))
            past = [*past, x_C][1:]
        tails.append(past)
    return y, np.array(tails).reshape(tail_BxSxC.shape)


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(causal_convolution)


def inputs(num_tokens: int, width: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, num_tokens, C), np.float32)
    taps = rng.standard_normal((width, C), np.float32)
    tail = rng.standard_normal((B, width - 1, C), np.float32)
    reset = rng.random((B, num_tokens)) < 0.25
    return x, taps, tail, reset


# Five products of float32 numbers of size 1, summed in another order.
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "width"), [(9, 4), (2, 4), (1, 4), (1, 2), (5, 1)])
def test_against_the_loop(compiled, num_tokens, width):
    arguments = inputs(num_tokens, width)
    y, tail = compiled(*arguments)
    y_expected, tail_expected = by_hand(*arguments)
    close(y, y_expected)
    np.testing.assert_array_equal(tail, tail_expected)


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [2, 1, 6]])
def test_any_cut_of_a_stream_is_the_same_stream(compiled, cuts):
    x, taps, tail, reset = inputs(9, 4, seed=1)
    whole, end = compiled(x, taps, tail, reset)
    pieces, at = [], 0
    for length in cuts:
        y, tail = compiled(x[:, at : at + length], taps, tail, reset[:, at : at + length])
        pieces.append(y)
        at += length
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    np.testing.assert_array_equal(tail, end)


def test_a_document_does_not_see_the_one_before(compiled):
    x, taps, tail, _ = inputs(6, 4)
    reset = np.zeros((B, 6), bool)
    reset[:, 3] = True
    y, _ = compiled(x, taps, tail, reset)
    x_other, tail_other = x.copy(), tail + 1
    x_other[:, :3] += 100
    y_other, _ = compiled(x_other, taps, tail_other, reset)
    np.testing.assert_array_equal(y[:, 3:], y_other[:, 3:])
    assert np.any(y[:, :3] != y_other[:, :3])


def test_gradients_against_finite_differences():
    """The derivative is written by hand: every input, in float64, with documents that begin inside and at the start."""
    x, taps, tail, _ = inputs(6, 3, seed=2)
    reset = np.zeros((B, 6), bool)
    reset[0, [2, 3]] = reset[1, 0] = True
    with jax.enable_x64(True):
        arguments = [jnp.asarray(a, jnp.float64) for a in (x, taps, tail)]

        @jax.jit
        def both(x, taps, tail):
            y, new_tail = causal_convolution(x, taps, tail, jnp.asarray(reset))
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(new_tail))

        # Central differences at 1e-6 in float64: truncation and rounding both leave about 1e-9.
        check_grads(both, arguments, order=1, modes=["rev"], eps=1e-6, atol=1e-7, rtol=1e-7)


def test_the_tail_keeps_its_type_and_the_output_that_of_the_input(compiled):
    x, taps, tail, reset = inputs(5, 4)
    y, new_tail = compiled(jnp.asarray(x, jnp.bfloat16), taps, tail, reset)
    assert (y.dtype, new_tail.dtype) == (jnp.bfloat16, jnp.float32)
