"""The memory along a stream against the same law, token by token, in float64 numpy."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.memory import hebbian
from phase2_jax.memory.config import ConsolidationConfig, LyapunovConfig, MemoryConfig
from phase2_jax.memory.hebbian import Writes
from phase2_jax.memory.state import MemoryState, init_memory_state
from phase2_jax.memory.stream import scan_stream
from phase2_jax.physics import lyapunov
from phase2_jax.physics.zeta import resonance_basis

B, N, H, K, V = 2, 20, 2, 3, 4
INTERVAL = 8
CONFIG = MemoryConfig(consolidation=ConsolidationConfig(INTERVAL))
OFF = MemoryConfig(consolidation=ConsolidationConfig(0))

# Everything here runs in float64, where two orders of summation differ by some 1e-14; consolidation amplifies that.
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def make_stream(seed: int, resets: bool = True) -> tuple[Writes, MemoryState, jax.Array]:
    """Tokens, a memory that has already lived, and a feedback matrix."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    writes = Writes(
        q_BxNxHxK=normal(B, N, H, K),
        k_BxNxHxK=normal(B, N, H, K),
        v_BxNxHxV=normal(B, N, H, V),
        log_decay_BxNxH=jnp.asarray(-rng.exponential(0.3, (B, N, H))),
        eta_BxNxH=jnp.asarray(rng.random((B, N, H))),
        reset_BxN=jnp.asarray(rng.random((B, N)) < 0.08 * resets),
    )
    state = replace(
        init_memory_state(B, H, K, V, H, 0, jnp.float64),
        w_BxHxKxV=0.3 * normal(B, H, K, V),
        eta_factor_BxH=jnp.asarray(1 + rng.random((B, H)) / 2),
        gamma_factor_BxH=jnp.asarray(1 + rng.random((B, H)) / 2),
        decay_BxH=jnp.asarray(rng.random((B, H))),
        coherence_BxH=jnp.full((B, H), 5.0),
    )
    return writes, state, normal(K, V) / 3


def consolidate(s: SimpleNamespace, config: MemoryConfig) -> None:
    """SNR selection and resonance, straight from their formulas."""
    snr, threshold = config.snr, config.resonance.threshold
    ratio = np.abs(s.w) / (s.w.std(axis=(2, 3), keepdims=True) + 1e-6)
    low = 1 / (1 + (ratio / snr.threshold) ** 4)
    mean_decay = 1 - s.decay / np.expm1(s.decay)
    w = s.w * np.exp(-(snr.gamma_boost - 1) * mean_decay[..., None, None] * low)
    s.eta_factor = 1 + (snr.eta_boost - 1) * (1 - low.mean(axis=(2, 3)))
    u = resonance_basis(K)
    e = np.linalg.norm(u.conj().T @ w, axis=-1)
    m = 1 / (1 + (threshold * e.max(-1, keepdims=True) / e) ** 8)
    s.w = ((u * m[..., None, :]) @ u.conj().T).real @ w
    s.decay = np.zeros((B, H))


def token_by_token(writes: Writes, state: MemoryState, p: jax.Array, config: MemoryConfig):
    q, k, v, log_decay, eta, reset = (np.asarray(leaf) for leaf in jax.tree.leaves(writes))
    s = SimpleNamespace(
        w=np.array(state.w_BxHxKxV),
        eta_factor=np.array(state.eta_factor_BxH),
        gamma_factor=np.array(state.gamma_factor_BxH),
        decay=np.array(state.decay_BxH),
        bound=np.array(state.coherence_BxH),
    )
    position, interval = int(state.position), config.consolidation.interval
    y, f = np.zeros(v.shape), np.zeros(v.shape[:2])
    for t in range(v.shape[1]):
        begins = reset[:, t]
        s.eta_factor[begins] = s.gamma_factor[begins] = 1
        s.w[begins] = s.decay[begins] = s.bound[begins] = 0
        rate = -log_decay[:, t] * s.gamma_factor
        strength = eta[:, t] * s.eta_factor
        s.w = np.exp(-rate)[..., None, None] * s.w
        value = v[:, t]
        if config.plasticity == "delta":
            strength = 1 - (1 - eta[:, t]) ** s.eta_factor
            value = value - np.einsum("bhk,bhkv->bhv", k[:, t], s.w)
        s.w = s.w + np.einsum("bh,bhk,bhv->bhkv", strength, k[:, t], value)
        norms = np.linalg.norm(k[:, t], axis=-1) * np.linalg.norm(value, axis=-1)
        s.bound = np.exp(-rate) * s.bound + strength * norms
        s.decay = s.decay + rate
        y[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], s.w)
        f[:, t] = np.einsum("kv,bhkv->b", np.asarray(p), s.w) / H
        position += 1
        if interval and position % interval == 0:
            consolidate(s, config)
    s.position = position
    return y, f, s


def check(readout: tuple, state: MemoryState, expected: tuple) -> None:
    y, f, s = expected
    close(readout[0], y)
    close(readout[1], f)
    close(state.w_BxHxKxV, s.w)
    close(state.eta_factor_BxH, s.eta_factor)
    close(state.gamma_factor_BxH, s.gamma_factor)
    close(state.decay_BxH, s.decay)
    close(state.coherence_BxH, s.bound)
    assert int(state.position) == s.position
    # ‖W‖ ≤ B always: writes add at most their norms, decay shrinks both alike, consolidation shrinks W alone.
    assert np.all(np.linalg.norm(state.w_BxHxKxV, axis=(2, 3)) <= np.asarray(state.coherence_BxH) * (1 + 1e-12))


scan = jax.jit(scan_stream, static_argnames=("config", "aligned", "implementation"))


def in_pieces(cuts, writes, state, p, config=CONFIG):
    at, pieces = 0, []
    writes = jax.tree.map(np.asarray, writes)  # which cuts without compiling
    for length in cuts:
        piece = jax.tree.map(lambda x, at=at, length=length: x[:, at : at + length], writes)
        *readout, state = scan(piece, state, p, config)
        pieces.append(readout)
        at += length
    return [np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)], state


@functools.cache
def example(seed: int, position: int = 0):
    writes, state, p = make_stream(seed)
    state = replace(state, position=jnp.asarray(position, jnp.int32))
    return writes, state, p, token_by_token(writes, state, p, CONFIG)


@pytest.mark.parametrize("position", [0, 3, 8])
def test_whole_stream(position):
    writes, state, p, expected = example(0, position)
    assert np.any(writes.reset_BxN), "no document begins: a useless example"
    *readout, state = scan(writes, state, p, CONFIG)
    check(tuple(readout), state, expected)


@pytest.mark.parametrize("position", [0, 16])
def test_aligned(position):
    writes, start, p, expected = example(1, position)
    *readout, state = scan(writes, start, p, CONFIG, aligned=True)
    check(tuple(readout), state, expected)
    jax.tree.map(close, state.lyapunov, scan(writes, start, p, CONFIG)[-1].lyapunov)


def test_the_monitor_of_aligned_intervals_that_it_controls():
    """Its verdict on an interval acts on the next, so that all have to be judged in turn."""
    control = replace(CONFIG, lyapunov=LyapunovConfig(control=True, gamma_boost=3.0))
    writes, start, p = make_stream(1, resets=False)
    writes = replace(writes, log_decay_BxNxH=writes.log_decay_BxNxH / 20)  # a memory that fills
    *readout, state = scan(writes, start, p, control, aligned=True)
    *expected, expected_state = scan(writes, start, p, control)
    jax.tree.map(close, (tuple(readout), state), (tuple(expected), expected_state))
    assert np.any(state.gamma_factor_BxH != 1), "nothing was unstable: a useless example"
    assert np.any(np.abs(readout[0] - scan(writes, start, p, CONFIG, aligned=True)[0]) > 1e-3)


@pytest.mark.parametrize("config", [OFF, CONFIG, replace(CONFIG, plasticity="delta")])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_scan_of_whole_states_runs_the_implementation_asked_for(monkeypatch, config, aligned):
    asked: set[tuple[int, str | None]] = set()

    def noted(scan, q, k, *rest, **options):
        asked.add((k.shape[-1], options.get("implementation")))
        return scan(q, k, *rest, **options)

    for module, name in (
        (hebbian, "hebbian_scan"),
        (hebbian, "delta_scan_with_values"),
        (lyapunov, "hebbian_scan"),
    ):
        monkeypatch.setattr(module, name, functools.partial(noted, getattr(module, name)))
    run = functools.partial(scan_stream, config=config, aligned=aligned, implementation="naive")
    jax.eval_shape(run, *make_stream(0))
    assert asked == {(K, "naive"), (1, None)}, "the scans of single numbers have kernels of their own"


LENGTHS = (1, 3, 8)  # one token; part of an interval; an interval, at any offset


@given(st.lists(st.sampled_from(LENGTHS), min_size=3, max_size=N), st.integers(0, 4), st.integers(0, 9))
def test_any_cut_of_a_stream_is_the_same_stream(lengths, seed, position):
    writes, start, p, expected = example(seed, position)
    cuts = []
    for length in [*lengths, *(1,) * N]:
        if sum(cuts) + length <= N:
            cuts.append(length)
    readout, state = in_pieces(cuts, writes, start, p)
    check(tuple(readout), state, expected)
    jax.tree.map(close, state.lyapunov, scan(writes, start, p, CONFIG)[-1].lyapunov)


@pytest.mark.parametrize("config", [OFF, MemoryConfig(consolidation=ConsolidationConfig(50))])
def test_no_consolidation_in_reach(config):
    writes, state, p, _ = example(0)
    *readout, end = scan(writes, state, p, config)
    check(tuple(readout), end, token_by_token(writes, state, p, config))


DELTA = replace(CONFIG, plasticity="delta")


def delta_stream(seed: int):
    writes, state, p = make_stream(seed)
    k_BxNxHxK = writes.k_BxNxHxK
    unit = replace(writes, k_BxNxHxK=k_BxNxHxK / jnp.linalg.norm(k_BxNxHxK, axis=-1, keepdims=True))
    return unit, replace(state, position=jnp.asarray(3, jnp.int32)), p


@pytest.mark.parametrize("cuts", [(N,), (3, 8, 1, 8)])
def test_corrected_errors_along_a_stream(cuts):
    """With consolidation, feedback and the monitor, however the stream is cut."""
    writes, start, p = delta_stream(0)
    assert np.any(writes.eta_BxNxH * start.eta_factor_BxH[:, None] > 1), "nothing to limit: a useless example"
    readout, state = in_pieces(cuts, writes, start, p, DELTA)
    check(tuple(readout), state, token_by_token(writes, start, p, DELTA))
    jax.tree.map(close, state.lyapunov, scan(writes, start, p, DELTA)[-1].lyapunov)


def test_a_raised_share_of_the_error_stays_below_one_and_keeps_its_gradient():
    writes, state, p = delta_stream(0)
    writes = replace(writes, reset_BxN=jnp.zeros((B, N), bool))
    state = replace(state, eta_factor_BxH=jnp.full((B, H), 1.5))

    def energy(eta):
        config = replace(DELTA, consolidation=ConsolidationConfig(0))
        end = scan(replace(writes, eta_BxNxH=jnp.full((B, N, H), eta)), state, p, config)[-1]
        return jnp.sum(jnp.square(end.w_BxHxKxV)), end.coherence_BxH

    # Multiplied, both shares would be beyond the whole error, and a limit would make them alike.
    (first, _), gradient = jax.value_and_grad(energy, has_aux=True)(0.7)
    second, _ = energy(0.9)
    assert first != second
    assert gradient != 0


def test_the_monitor_follows_the_memory_that_corrects_errors():
    writes, start, p = delta_stream(1)
    # Of a prime interval above 64 every token is a chunk of the monitor.
    config = replace(DELTA, consolidation=ConsolidationConfig(67))
    end = scan(writes, start, p, config)[-1]
    close(end.lyapunov.chunk_energy_BxH, np.square(end.w_BxHxKxV).sum((-2, -1)))


def test_a_document_starts_from_nothing():
    """After a reset, nothing that came before has any influence, not even through what consolidation decided."""
    writes, state, p = make_stream(3, resets=False)
    at = 12
    writes = replace(writes, reset_BxN=writes.reset_BxN.at[:, at].set(True))
    fresh = replace(init_memory_state(B, H, K, V, H, 0, jnp.float64), position=jnp.asarray(at, jnp.int32))
    *readout, end = scan(writes, state, p, CONFIG)
    document = jax.tree.map(lambda x: np.asarray(x)[:, at:], replace(writes, reset_BxN=jnp.zeros((B, N), bool)))
    *alone, end_alone = scan(document, fresh, p, CONFIG)
    jax.tree.map(lambda a, b: close(a[:, at:], b), tuple(readout), tuple(alone))
    jax.tree.map(close, replace(end, lyapunov=None), replace(end_alone, lyapunov=None))


@pytest.mark.parametrize(
    ("plasticity", "aligned", "length", "position"),
    [("hebbian", True, 8, 0), ("hebbian", False, 4, 2), ("delta", True, 8, 0)],
)
def test_gradients_through_consolidations(plasticity, aligned, length, position):
    """Every input against central differences in a random direction; consolidation every 4 tokens."""
    writes, state, p = make_stream(5, resets=False)
    writes = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:, :length]), writes)
    # A document begins inside, in one row only.
    writes = replace(writes, reset_BxN=writes.reset_BxN.at[0, 2].set(True))
    state = replace(state, position=jnp.asarray(position, jnp.int32))
    config = MemoryConfig(consolidation=ConsolidationConfig(4), plasticity=plasticity)
    weights = make_stream(6)[0]

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(inputs):
        inner = replace(writes, **{name: inputs[name] for name in tokens})
        y, f, end = scan_stream(inner, replace(state, w_BxHxKxV=inputs["w"]), inputs["p"], config, aligned=aligned)
        total = jnp.sum(jnp.sin(y) * weights.v_BxNxHxV[:, :length]) + jnp.sum(jnp.sin(f))
        return total + jnp.sum(jnp.sin(end.w_BxHxKxV)) + jnp.sum(end.eta_factor_BxH) + jnp.sum(end.decay_BxH)

    tokens = ("q_BxNxHxK", "k_BxNxHxK", "v_BxNxHxV", "log_decay_BxNxH", "eta_BxNxH")
    inputs = {name: getattr(writes, name) for name in tokens} | {"w": state.w_BxHxKxV, "p": p}
    gradient = loss_and_gradient(inputs)[1]
    rng = np.random.default_rng(7)
    for name, x in inputs.items():
        direction = rng.standard_normal(x.shape)
        ahead, behind = (loss_and_gradient(inputs | {name: x + step * direction})[0] for step in (1e-5, -1e-5))
        slope = float(np.sum(gradient[name] * direction))
        # Differences err by 1e-10 times a third derivative, and 1e-16 / 1e-5 by rounding.
        assert slope == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-6, abs=1e-8), name
        assert abs(slope) > 1e-3, f"{name} has no influence: a useless example"
