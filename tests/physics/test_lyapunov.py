"""The Lyapunov monitor against its definition, token by token, in float64 numpy."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.physics.lyapunov import (
    LyapunovState,
    chunk_length,
    close_interval,
    energy,
    init_lyapunov_state,
    observe,
)

B, N, H, K, V, CHUNK = 2, 13, 2, 3, 4, 4

# Energies up to 20 from float32 sums of squares.
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
watch = jax.jit(observe, static_argnames="chunk")


@pytest.fixture(scope="module")
def tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    reset_BxN = np.zeros((B, N), bool)
    reset_BxN[0, [0, 6, 7]] = reset_BxN[1, 8] = True
    return {
        "k": rng.standard_normal((B, N, H, K), np.float32),
        "v": rng.standard_normal((B, N, H, V), np.float32),
        "log_decay": -rng.exponential(0.2, (B, N, H)).astype(np.float32),
        "eta": rng.random((B, N, H), np.float32),
        "reset": reset_BxN,
    }


@pytest.fixture(scope="module")
def w_start() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((B, H, K, V), np.float32)


def by_definition(tokens: dict[str, np.ndarray], w: np.ndarray, position: int) -> SimpleNamespace:
    """Chunk energies, decays and supply after all tokens, and W."""
    w = w.astype(np.float64)
    energy_of = lambda w: np.square(w).sum((2, 3))  # noqa: E731
    s = SimpleNamespace(w=w, chunk_energy=energy_of(w), interval_energy=energy_of(w))
    s.chunk_decay, s.supply = np.zeros((B, H)), np.zeros((B, H))
    for t in range(tokens["k"].shape[1]):
        begins = tokens["reset"][:, t]
        for figure in (s.w, s.chunk_energy, s.interval_energy, s.chunk_decay, s.supply):
            figure[begins] = 0
        rate = -tokens["log_decay"][:, t]
        written = np.einsum("bh,bhk,bhv->bhkv", tokens["eta"][:, t], tokens["k"][:, t], tokens["v"][:, t])
        s.w = np.exp(-rate)[..., None, None] * s.w + written
        s.chunk_decay = s.chunk_decay + rate
        position += 1
        if position % CHUNK == 0:
            now = energy_of(s.w)
            s.supply = s.supply + np.maximum(now - np.exp(-2 * s.chunk_decay) * s.chunk_energy, 0)
            s.chunk_energy, s.chunk_decay = now, np.zeros((B, H))
    return s


def start(w_start: np.ndarray) -> LyapunovState:
    e = energy(jnp.asarray(w_start))
    return replace(init_lyapunov_state(B, H), chunk_energy_BxH=e, interval_energy_BxH=e)


def in_pieces(cuts: list[int], tokens: dict[str, np.ndarray], w_start: np.ndarray, position: int) -> LyapunovState:
    state, at = start(w_start), 0
    for length in cuts:
        before, piece = ({n: x[:, a:b] for n, x in tokens.items()} for a, b in ((0, at), (at, at + length)))
        w = jnp.asarray(by_definition(before, w_start, position).w, jnp.float32)
        state = watch(state, w, *piece.values(), position=jnp.asarray(position + at, jnp.int32), chunk=CHUNK)
        at += length
    return state


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("cuts", [[13], [1] * 13, [4, 4, 4, 1], [1, 4, 4, 4]])
def test_against_the_definition_for_any_cut(tokens, w_start, cuts, position):
    state = in_pieces(cuts, tokens, w_start, position)
    expected = by_definition(tokens, w_start, position)
    close(state.supply_BxH, expected.supply)
    close(state.chunk_energy_BxH, expected.chunk_energy)
    close(state.chunk_decay_BxH, expected.chunk_decay)
    close(state.interval_energy_BxH, expected.interval_energy)
    assert np.all(expected.supply > 0), "nothing was supplied: a useless example"


def test_a_decaying_memory_is_supplied_with_nothing(tokens, w_start):
    silent = tokens | {"eta": np.zeros_like(tokens["eta"]), "reset": np.zeros((B, N), bool)}
    state = in_pieces([13], silent, w_start, 0)
    # max(S, 0) of an S that is 0 but for rounding, relative to energies of about 10.
    np.testing.assert_allclose(state.supply_BxH, 0, atol=1e-5)


def test_what_is_not_written_need_not_have_a_finite_square(tokens, w_start):
    huge = {"v": np.full_like(tokens["v"], 3e38), "eta": np.zeros_like(tokens["eta"]), "reset": np.zeros((B, N), bool)}
    huge = tokens | huge
    state = in_pieces([13], huge, w_start, 0)
    close(state.chunk_energy_BxH, by_definition(huge, w_start, 0).chunk_energy)


def test_chunks_divide_the_interval():
    assert [chunk_length(interval) for interval in (0, 8, 64, 256, 100, 96, 67)] == [64, 8, 64, 64, 50, 48, 1]


def verdict(**figures: float) -> LyapunovState:
    names = ("chunk_energy", "chunk_decay", "interval_energy", "supply")
    state = replace(
        init_lyapunov_state(1, 1), **{f"{name}_BxH": jnp.full((1, 1), figures.get(name, 0.0)) for name in names}
    )
    return close_interval(state, jnp.full((1, 1), figures["end"]), jnp.full((1, 1), figures.get("start", 7.0)))


@pytest.mark.parametrize(
    ("figures", "stable"),
    [
        ({"end": 5.0, "interval_energy": 4.0, "supply": 10.5}, True),  # grew by 1, a tenth of 10.5 allowed
        ({"end": 5.0, "interval_energy": 4.0, "supply": 9.5}, False),
        ({"end": 3.0, "interval_energy": 4.0, "supply": 0.0}, True),  # shrank
        ({"end": 0.0, "interval_energy": 0.0, "supply": 0.0}, True),  # empty and idle
        # The unfinished chunk supplied 5 − e^{-2·50}·4 = 5 on top of 5.5.
        ({"end": 5.0, "interval_energy": 4.0, "supply": 5.5, "chunk_energy": 4.0, "chunk_decay": 50.0}, True),
        ({"end": 5.0, "interval_energy": 4.0, "supply": 4.5, "chunk_energy": 4.0, "chunk_decay": 50.0}, False),
    ],
)
def test_verdict(figures, stable):
    after = verdict(**figures)
    assert bool(after.stable_BxH[0, 0]) is stable
    assert float(after.energy_change_BxH[0, 0]) == figures["end"] - figures["interval_energy"]


def test_the_next_interval_starts_from_the_energy_after_consolidation():
    after = verdict(end=5.0, start=3.0, supply=4.0, chunk_decay=1.0)
    assert float(after.chunk_energy_BxH[0, 0]) == float(after.interval_energy_BxH[0, 0]) == 3.0
    assert float(after.supply_BxH[0, 0]) == float(after.chunk_decay_BxH[0, 0]) == 0.0


def test_read_only(tokens, w_start):
    """No figure of the monitor has a gradient, neither to the tokens nor to the memory nor to its own past."""

    def total(floats, reset):
        k, v, log_decay, eta = (floats[name] for name in ("k", "v", "log_decay", "eta"))
        state = observe(floats["state"], floats["w"], k, v, log_decay, eta, reset, jnp.asarray(0), CHUNK)
        closed = close_interval(state, energy(floats["w"]), 2 * energy(floats["w"]))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((state, closed)))

    floats = {name: jnp.asarray(x) for name, x in tokens.items() if name != "reset"}
    gradient = jax.grad(total)(floats | {"w": jnp.asarray(w_start), "state": start(w_start)}, jnp.zeros((B, N), bool))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


# Measured over the whole stream: 4e-4, 6e-4, 2e-3, 1.4e-2. It grows where nothing is forgotten.
@pytest.mark.parametrize(
    ("corrected", "rate", "tolerance"),
    [(False, 1e-3, 2e-3), (False, 1e-5, 2e-3), (True, 1e-3, 5e-3), (True, 1e-5, 3e-2)],
)
def test_a_long_stream_in_bfloat16(corrected, rate, tolerance):
    """Rounded to 8 bits, what keys read must not add up, not even where a write replaces what its key held."""
    rng = np.random.default_rng(2)
    length, width = 2048, 64
    k = rng.standard_normal((1, length, 1, width))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (k, rng.standard_normal(k.shape)))
    w, now = np.zeros((width, width)), []
    for t in range(length):
        w = np.exp(-rate) * w
        if corrected:
            v[0, t, 0] = np.asarray(jnp.asarray(v[0, t, 0] - k[0, t, 0] @ w, jnp.bfloat16), np.float64)
        w = w + np.outer(k[0, t, 0], v[0, t, 0])
        now.append(np.square(w).sum())
    gates = jnp.full((1, length, 1), -rate), jnp.ones((1, length, 1))
    rounded = (jnp.asarray(x, jnp.bfloat16) for x in (k, v))
    end = watch(
        init_lyapunov_state(1, 1),
        jnp.zeros((1, 1, width, width)),
        *rounded,
        *gates,
        jnp.zeros((1, length), bool),
        jnp.asarray(0),
        64,
    )
    assert float(end.chunk_energy_BxH[0, 0]) == pytest.approx(now[-1], rel=tolerance)
