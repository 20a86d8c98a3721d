"""The Hebbian scan of narrow states, with the recurrence of its GPU kernel in plain JAX, against the law in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.batching import over_rows
from pallas_kernels.chunking import pad_tokens
from pallas_kernels.hebbian import naive, narrow
from pallas_kernels.hebbian.decays import decayed

# Tokens of a lane and lanes of a block: short, so that few tokens fill several blocks.
STEP, LANES = 4, 8
GONE = -128.0
NAMES = ("y", "final", "dq", "dk", "dv", "dlog_decay", "deta", "dinitial")


def join(first, second):
    """Two stretches in a row as one, as the kernel scans them."""
    log_decay, added = first[2:]
    later_before, later_added_before, later_log_decay, later_added = second
    return (
        log_decay + later_before,
        decayed(later_before, added) + later_added_before,
        log_decay + later_log_decay,
        decayed(later_log_decay, added) + later_added,
    )


def one_block(state, xs):
    """The state after a block's tokens and all its states; steps and writes (STEP, LANES, B, H, K, V)."""
    steps, writes = xs
    local = jnp.zeros_like(writes[0])
    for step, write in zip(steps, writes, strict=True):
        local = decayed(step, local) + write
    nothing, total = jnp.zeros_like(local), jnp.sum(steps, axis=0)
    before, added_before, total, local = jax.lax.associative_scan(join, (nothing, nothing, total, local))
    states = [decayed(before, state) + added_before]
    for step, write in zip(steps, writes, strict=True):
        states.append(decayed(step, states[-1]) + write)
    return decayed(total[-1], state) + local[-1], jnp.stack(states[1:])


def in_blocks(log_decay, cut, added, initial, reverse):
    """`triton_narrow.recurrence` in plain JAX."""
    num_tokens = added.shape[1]
    decays = log_decay if cut is None else jnp.where(cut, GONE, log_decay)
    if reverse:
        decays, added = jnp.flip(decays, 1), jnp.flip(added, 1)
        decays = jnp.pad(decays[:, :-1], ((0, 0), (1, 0), (0, 0)))
    steps = jnp.broadcast_to(decays[..., None, None], added.shape)

    def cut_up(x):
        x = jnp.moveaxis(pad_tokens(x, STEP * LANES), 1, 0)
        return jnp.moveaxis(x.reshape(-1, LANES, STEP, *x.shape[1:]), 2, 1)

    start = jnp.zeros_like(added[:, 0]) if initial is None else initial
    _, states = jax.lax.scan(one_block, start, (cut_up(steps), cut_up(added)))
    states = jnp.moveaxis(states, 1, 2).reshape(-1, *added.shape[:1], *added.shape[2:])
    states = jnp.moveaxis(states[:num_tokens], 0, 1)
    return jnp.flip(states, 1) if reverse else states


def launched(log_decay, cut, added, initial, *, reverse):
    """A kernel's stand-in: nothing inside can be mapped over."""

    @jax.custom_batching.custom_vmap
    def kernel(log_decay, cut, added, initial):
        return in_blocks(log_decay, cut, added, initial, reverse)

    @kernel.def_vmap
    def refuse(axis_size, in_batched, log_decay, cut, added, initial):
        raise AssertionError("a kernel cannot be mapped over")

    return kernel(log_decay, cut, added, initial)


def recurrence(log_decay, cut, added, initial, reverse):
    return over_rows(functools.partial(launched, reverse=reverse))(log_decay, cut, added, initial)


def make_inputs(rng, num_tokens, widths, rate, *, batch=2, heads=3):
    """(arguments, cotangents), float64 on the host."""
    sizes, (keys, values) = (batch, num_tokens, heads), widths
    vectors = [rng.normal(size=(*sizes, width)) for width in (keys, keys, values)]
    decays, eta = -rate * np.abs(rng.normal(size=sizes)), rng.normal(size=sizes)
    initial = rng.normal(size=(batch, heads, keys, values))
    return (*vectors, decays, eta, initial), (rng.normal(size=(*sizes, values)), initial[::-1] + 1)


def with_gradients(scan, arguments, cotangents):
    results, pullback = jax.vjp(scan, *arguments)
    return (*results, *pullback(cotangents))


def compare(dtype, arguments, cotangents, reset, bound, transform=lambda compute: compute):
    """Values and gradients, under a transformation, against those of the law."""
    inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), (arguments, cotangents))

    def run(scan, inputs):
        compute = functools.partial(with_gradients, functools.partial(scan, reset_BxN=reset))
        return jax.tree.map(np.asarray, jax.jit(transform(compute))(*inputs))

    found = run(functools.partial(narrow.scan, recurrence=recurrence), inputs)
    with jax.enable_x64(True):
        expected = run(naive.scan, jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), inputs))
    for name, x, reference in zip(NAMES, found, expected, strict=True):
        assert x.shape == reference.shape
        assert np.linalg.norm(x - reference) <= bound * np.linalg.norm(reference), name


# One token, part of a lane, several blocks that do not come out even; memories longer than all of them, and forgetting
# within a token.
@pytest.mark.parametrize(
    ("num_tokens", "widths", "rate", "resets"),
    [
        (1, (1, 2), 0.1, True),
        (3, (4, 4), 1e-3, False),
        (33, (3, 5), 1.3, True),
        (301, (1, 2), 1e-3, False),
        (301, (1, 2), 1e-3, True),
        (301, (1, 2), 40.0, False),
    ],
)
def test_values_and_every_gradient_are_those_of_the_law(num_tokens, widths, rate, resets):
    rng = np.random.default_rng(0)
    arguments, cotangents = make_inputs(rng, num_tokens, widths, rate)
    reset = jnp.asarray(rng.random((2, num_tokens)) < 0.1) if resets else None
    with jax.enable_x64(True):
        compare(jnp.float64, arguments, cotangents, reset, 1e-13)
    compare(jnp.float32, arguments, cotangents, reset, 1e-6)


def test_extreme_decays_and_cuts_leave_nothing():
    rng = np.random.default_rng(1)
    arguments, cotangents = make_inputs(rng, 200, (1, 2), 1.0)
    log_decay = rng.choice([0.0, -1e-30, -100.0, -1e5, -1e38], size=arguments[3].shape)
    reset = jnp.asarray(rng.random((2, 200)) < 0.1)
    compare(jnp.float32, (*arguments[:3], log_decay, *arguments[4:]), cotangents, reset, 1e-6)


def test_what_is_cut_is_exactly_zero():
    ones, gate = jnp.ones((1, 40, 1, 1), jnp.float32), jnp.zeros((1, 40, 1), jnp.float32)
    reset = jnp.zeros((1, 40), bool).at[:, -1].set(True)
    huge = jnp.full((1, 1, 1, 1), 1e30, jnp.float32)
    y, final = narrow.scan(ones, ones, ones, gate, gate + 1, huge, reset, recurrence=recurrence)
    assert float(y[0, -1, 0, 0]) == float(final[0, 0, 0, 0]) == 1.0


@pytest.mark.parametrize("resets", [False, True])
def test_a_map_over_it_joins_the_batch(resets):
    rng = np.random.default_rng(3)
    arguments, cotangents = make_inputs(rng, 67, (1, 2), 0.1)
    several = tuple(np.stack([x, -x, 2 * x]) if place != 3 else x for place, x in enumerate(arguments))
    reset = jnp.asarray(rng.random((2, 67)) < 0.1) if resets else None
    in_axes = (tuple(None if place == 3 else 0 for place in range(6)), None)
    compare(jnp.float32, several, cotangents, reset, 1e-6, functools.partial(jax.vmap, in_axes=in_axes))
