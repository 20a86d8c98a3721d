"""The memory along a stream: dissipative scan, feedback to the next layer's potential, consolidation on the way.

    W_t = e^{-Γ_t dt} W_{t-1} + η_t k_t v_t^T,    y_t = W_t^T q_t,    f_{t,h} = ⟨P, W_{t,h}⟩

with u_t = v_t − e^{-Γ_t dt} W_{t-1}^T k_t in the place of v_t when the plasticity corrects errors (the delta rule),
between consolidations, which happen after every stream position that is a multiple of the interval. However a stream
is cut into calls, the result is the same function of its tokens.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import delta_scan_with_values, hebbian_scan
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.consolidation import consolidate
from phase2_jax.memory.state import MemoryState
from phase2_jax.physics import lyapunov
from phase2_jax.recompute import recomputed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Writes:
    """What the tokens ask of the memory.

    Attributes:
      q_BxNxHxK, k_BxNxHxK, v_BxNxHxV: queries, keys and values in the compute dtype.
      log_decay_BxNxH: −Γ_t dt ≤ 0, float32.
      eta_BxNxH: write strength η_t ≥ 0, float32.
      reset_BxN: True wipes the memory before that token (a document begins).
    """

    q_BxNxHxK: jax.Array
    k_BxNxHxK: jax.Array
    v_BxNxHxV: jax.Array
    log_decay_BxNxH: jax.Array
    eta_BxNxH: jax.Array
    reset_BxN: jax.Array

    def only(self, active_N: jax.Array) -> "Writes":
        """The same tokens, of which only the active ones write, forget or reset."""
        active_1xN = active_N[None]
        return replace(
            self,
            log_decay_BxNxH=jnp.where(active_1xN[..., None], self.log_decay_BxNxH, 0),
            eta_BxNxH=jnp.where(active_1xN[..., None], self.eta_BxNxH, 0),
            reset_BxN=self.reset_BxN & active_1xN,
        )


Readout = tuple[jax.Array, jax.Array]


def _store(
    writes: Writes, w_BxHxKxV: jax.Array, plasticity: str, implementation: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Readouts `(B, N, H, V)`, the weights after the last token, and the values that were written `(B, N, H, V)`."""
    arguments = (
        writes.q_BxNxHxK,
        writes.k_BxNxHxK,
        writes.v_BxNxHxV,
        writes.log_decay_BxNxH,
        writes.eta_BxNxH,
        w_BxHxKxV,
    )
    if plasticity == "delta":
        return delta_scan_with_values(*arguments, reset=writes.reset_BxN, implementation=implementation)
    return *hebbian_scan(*arguments, reset=writes.reset_BxN, implementation=implementation), writes.v_BxNxHxV


def _raised(eta_BxNxH: jax.Array, factor_BxNxH: jax.Array, plasticity: str) -> jax.Array:
    """η as consolidation raises it: η·factor, with the delta rule 1 − (1 − η)^factor for η ≤ 1."""
    if plasticity != "delta":
        return eta_BxNxH * factor_BxNxH
    # More than the whole error would overshoot; a clipped η would leave its gate without a gradient. The whole error
    # itself has an infinite logarithm.
    below_one_BxNxH = jnp.minimum(eta_BxNxH, 1 - 1e-6)
    return -jnp.expm1(factor_BxNxH * jnp.log1p(-below_one_BxNxH))


@recomputed
def _fed_back(k_BxNxHxK: jax.Array, v_BxNxHxV: jax.Array, feedback_KxV: jax.Array) -> jax.Array:
    """⟨P, k vᵀ⟩ of every token and head; of its wide products nothing is kept for the backward pass."""
    dtype = feedback_KxV.dtype
    kp_BxNxHxV = jnp.einsum(
        "bnhk,kv->bnhv", k_BxNxHxK, feedback_KxV.astype(k_BxNxHxK.dtype), preferred_element_type=dtype
    )
    return jnp.sum(kp_BxNxHxV * v_BxNxHxV.astype(dtype), axis=-1)


def _scan_piece(
    writes: Writes, state: MemoryState, feedback_KxV: jax.Array, config: MemoryConfig, implementation: str | None
) -> tuple[Readout, MemoryState]:
    """Tokens between two consolidations. The position stays where it was: `scan_stream` moves it."""
    dtype = state.w_BxHxKxV.dtype
    begun_BxN = jnp.cumsum(writes.reset_BxN, axis=1)
    # What the last consolidation decided holds until a new document begins.
    same_document_BxNx1 = (begun_BxN == 0)[..., None]
    eta_BxNxH = _raised(
        writes.eta_BxNxH, jnp.where(same_document_BxNx1, state.eta_factor_BxH[:, None], 1), config.plasticity
    )
    log_decay_BxNxH = writes.log_decay_BxNxH * jnp.where(same_document_BxNx1, state.gamma_factor_BxH[:, None], 1)
    writes = replace(writes, log_decay_BxNxH=log_decay_BxNxH, eta_BxNxH=eta_BxNxH)
    y_BxNxHxV, w_BxHxKxV, v = _store(writes, state.w_BxHxKxV, config.plasticity, implementation)
    k = writes.k_BxNxHxK

    # f and the coherence bound are linear in the writes: a memory with one key and two values follows them exactly.
    feedback_BxNxH = _fed_back(k, v, feedback_KxV)
    norms_BxNxH = jax.lax.stop_gradient(
        jnp.linalg.norm(k.astype(dtype), axis=-1) * jnp.linalg.norm(v.astype(dtype), axis=-1)
    )
    ones_BxNxHx1 = jnp.ones((*eta_BxNxH.shape, 1), dtype)
    start_BxHx1x2 = jnp.stack([jnp.einsum("kv,bhkv->bh", feedback_KxV, state.w_BxHxKxV), state.coherence_BxH], axis=-1)[
        :, :, None
    ]
    linear_BxNxHx2, linear_end_BxHx1x2 = hebbian_scan(
        ones_BxNxHx1,
        ones_BxNxHx1,
        jnp.stack([feedback_BxNxH, norms_BxNxH], axis=-1),
        log_decay_BxNxH,
        eta_BxNxH,
        start_BxHx1x2,
        reset=writes.reset_BxN,
    )
    f_BxN = jnp.mean(linear_BxNxHx2[..., 0], axis=-1)

    last_document_BxNx1 = (begun_BxN == begun_BxN[:, -1:])[..., None]
    decay_BxH = -jnp.sum(jnp.where(last_document_BxNx1, log_decay_BxNxH, 0), axis=1)
    unbroken_Bx1 = begun_BxN[:, -1:] == 0
    monitor = lyapunov.observe(
        state.lyapunov,
        state.w_BxHxKxV,
        k,
        v,
        log_decay_BxNxH,
        eta_BxNxH,
        writes.reset_BxN,
        state.position,
        lyapunov.chunk_length(config.consolidation.interval),
    )
    return (y_BxNxHxV, f_BxN), replace(
        state,
        w_BxHxKxV=w_BxHxKxV,
        eta_factor_BxH=jnp.where(unbroken_Bx1, state.eta_factor_BxH, 1),
        gamma_factor_BxH=jnp.where(unbroken_Bx1, state.gamma_factor_BxH, 1),
        decay_BxH=jnp.where(unbroken_Bx1, state.decay_BxH, 0) + decay_BxH,
        coherence_BxH=linear_end_BxHx1x2[:, :, 0, 1],
        lyapunov=monitor,
    )


def _advance(state: MemoryState, num_tokens: int) -> MemoryState:
    return replace(state, position=state.position + num_tokens)


def scan_stream(
    writes: Writes,
    state: MemoryState,
    feedback_KxV: jax.Array,
    config: MemoryConfig,
    *,
    aligned: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, MemoryState]:
    """Run the memory over N tokens from `state`.

    Args:
      writes: the tokens.
      state: the memory before them; its position says where the next consolidation falls.
      feedback_KxV: P of the feedback ⟨P, W⟩, float32.
      config: consolidation and what it does.
      aligned: the caller promises that `state.position` is a multiple of the interval, which spares the compiled
        program the branches for consolidations at arbitrary places.
      implementation: of the scan, as in `pallas_kernels.hebbian_scan`.

    Returns:
      readouts `(B, N, H, V)`, feedback averaged over the heads `(B, N)` float32, and the state after the last token.
    """
    interval = config.consolidation.interval
    num_tokens = writes.q_BxNxHxK.shape[1]

    def scan(writes: Writes, state: MemoryState) -> tuple[Readout, MemoryState]:
        return _scan_piece(writes, state, feedback_KxV, config, implementation)

    if interval == 0:
        readout, state = scan(writes, state)
        end_energy_BxH = lyapunov.energy(state.w_BxHxKxV)
        monitor = lyapunov.close_interval(state.lyapunov, end_energy_BxH, end_energy_BxH)
        return *readout, _advance(replace(state, lyapunov=monitor), num_tokens)

    # Of a dozen arrays of the size of W only W is kept for the backward pass.
    consolidated = recomputed(lambda state: consolidate(state, config))

    def whole_interval(state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
        readout, state = scan(writes, state)
        return _advance(consolidated(state), interval), readout

    def any_piece(state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
        length = writes.q_BxNxHxK.shape[1]
        until = interval - state.position % interval
        before_N = jnp.arange(length) < until
        readout, state = scan(writes.only(before_N), state)
        state = jax.lax.cond(until <= length, consolidated, lambda s: s, state)

        def rest(readout: Readout, state: MemoryState) -> tuple[Readout, MemoryState]:
            later, state = scan(writes.only(~before_N), state)
            select = lambda a, b: jnp.where(before_N.reshape(1, length, *(1,) * (a.ndim - 2)), a, b)  # noqa: E731
            return jax.tree.map(select, readout, later), state

        if length > 1:
            readout, state = jax.lax.cond(until < length, rest, lambda readout, state: (readout, state), readout, state)
        return _advance(state, length), readout

    def last_piece(state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
        readout, state = scan(writes, state)
        return _advance(state, writes.q_BxNxHxK.shape[1]), readout

    piece = interval if aligned else min(interval, num_tokens)
    num_pieces, remainder = divmod(num_tokens, piece)
    readouts: list[Readout] = []
    if num_pieces:
        body = whole_interval if aligned else any_piece
        head = jax.tree.map(lambda x: x[:, : num_pieces * piece], writes)
        if num_pieces == 1:
            state, readout = body(state, head)
        else:
            cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], num_pieces, piece, *x.shape[2:]), 1, 0)  # noqa: E731
            state, readout = jax.lax.scan(body, state, jax.tree.map(cut, head))
            join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num_pieces * piece, *x.shape[3:])  # noqa: E731
            readout = jax.tree.map(join, readout)
        readouts.append(readout)
    if remainder:
        tail = jax.tree.map(lambda x: x[:, num_pieces * piece :], writes)
        state, readout = (last_piece if aligned else any_piece)(state, tail)
        readouts.append(readout)
    y_BxNxHxV, f_BxN = (
        jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *readouts) if len(readouts) > 1 else readouts[0]
    )
    return y_BxNxHxV, f_BxN, state
