"""The memory along a stream, with consolidation after every position that is a multiple of the interval.

However a stream is cut into calls, the result is the same function of its tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phase2_jax.memory import consolidation
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.hebbian import Writes, coherence, feedback, overlap, write
from phase2_jax.memory.state import MemoryState
from phase2_jax.physics import lyapunov
from phase2_jax.recompute import recomputed

Readout = tuple[jax.Array, jax.Array]


class _Fixed(NamedTuple):
    """What all pieces of a stream share, as in `scan_stream`."""

    feedback_KxV: jax.Array | None
    config: MemoryConfig
    implementation: str | None

    def consolidate(self, step: Callable[..., MemoryState], state: MemoryState) -> MemoryState:
        """`consolidation.consolidate` or `refine`: of a dozen arrays of the size of W only W is kept for the backward
        pass.
        """
        return recomputed(partial(step, config=self.config))(state)


def scan_stream(
    writes: Writes,
    state: MemoryState,
    feedback_KxV: jax.Array | None,
    config: MemoryConfig,
    *,
    aligned: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, MemoryState]:
    """Run the memory over N tokens from `state`.

    Args:
      writes: the tokens.
      state: the memory before them; its position says where the next consolidation falls.
      feedback_KxV: P of the feedback ⟨P, W⟩, float32; None where there is none.
      config: consolidation and what it does.
      aligned: the caller promises that `state.position` is a multiple of the interval, which spares the compiled
        program the branches for consolidations at arbitrary places.
      implementation: of the scan, as in `pallas_kernels.hebbian_scan`.

    Returns:
      readouts `(B, N, H, V)`, feedback averaged over the heads `(B, N)` float32, and the state after the last token.
    """
    fixed = _Fixed(feedback_KxV, config, implementation)
    interval = config.consolidation.interval
    num_tokens = writes.q_BxNxHxK.shape[1]
    if interval == 0:
        state, readout = _piece(fixed, state, writes)
        end_energy_BxH = lyapunov.energy(state.w_BxHxKxV)
        monitor = lyapunov.close_interval(state.lyapunov, end_energy_BxH, end_energy_BxH)
        return *readout, replace(state, lyapunov=monitor)

    if not aligned:
        whole, rest = partial(_loop, partial(_any_piece, fixed)), partial(_any_piece, fixed)
    elif config.lyapunov.control:
        whole, rest = partial(_loop, partial(_judged_interval, fixed)), partial(_piece, fixed)
    else:
        whole, rest = partial(_intervals, fixed), partial(_piece, fixed)
    piece = interval if aligned else min(interval, num_tokens)
    num_pieces, remainder = divmod(num_tokens, piece)
    readouts: list[Readout] = []
    if num_pieces:
        cut = lambda x: jnp.moveaxis(x[:, : num_pieces * piece].reshape(-1, num_pieces, piece, *x.shape[2:]), 1, 0)  # noqa: E731
        state, readout = whole(state, jax.tree.map(cut, writes))
        readouts.append(jax.tree.map(_joined, readout))
    if remainder:
        state, readout = rest(state, jax.tree.map(lambda x: x[:, num_pieces * piece :], writes))
        readouts.append(readout)
    if len(readouts) == 1:
        return *readouts[0], state
    return *jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *readouts), state


def _joined(x_PxBxN: jax.Array) -> jax.Array:
    x_BxPxN = jnp.moveaxis(x_PxBxN, 0, 1)
    return x_BxPxN.reshape(x_BxPxN.shape[0], -1, *x_BxPxN.shape[3:])


def _loop(body: Callable[[Any, Writes], tuple[Any, Any]], carry: Any, pieces: Writes) -> tuple[Any, Any]:
    """`jax.lax.scan`, but a single piece is no loop."""
    if pieces.q_BxNxHxK.shape[0] > 1:
        return jax.lax.scan(body, carry, pieces)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], pieces))
    return carry, jax.tree.map(lambda x: x[None], out)


def _advance(state: MemoryState, num_tokens: int) -> MemoryState:
    return replace(state, position=state.position + num_tokens)


def _observed(fixed: _Fixed, before: MemoryState, written: Writes) -> lyapunov.LyapunovState:
    """The monitor of `before` after what was written to its memory."""
    return lyapunov.observe(
        before.lyapunov,
        before.w_BxHxKxV,
        written.k_BxNxHxK,
        written.v_BxNxHxV,
        written.log_decay_BxNxH,
        written.eta_BxNxH,
        written.reset_BxN,
        before.position,
        lyapunov.chunk_length(fixed.config.consolidation.interval),
        fixed.implementation,
    )


def _stored(fixed: _Fixed, state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
    """Tokens between two consolidations. The position stays where it was."""
    y_BxNxHxV, written, after = write(writes, state, fixed.config, fixed.implementation)
    f_BxN = feedback(written, overlap(fixed.feedback_KxV, state.w_BxHxKxV), fixed.feedback_KxV)
    bound_BxH = coherence(written, state.coherence_BxH)
    after = replace(after, coherence_BxH=bound_BxH, lyapunov=_observed(fixed, state, written))
    return after, (y_BxNxHxV, f_BxN)


def _piece(fixed: _Fixed, state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
    """Tokens after none of which a consolidation falls."""
    state, readout = _stored(fixed, state, writes)
    return _advance(state, writes.q_BxNxHxK.shape[1]), readout


def _judged_interval(fixed: _Fixed, state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
    """A whole interval and its consolidation, with a verdict that the next one heeds."""
    state, readout = _stored(fixed, state, writes)
    return _advance(fixed.consolidate(consolidation.consolidate, state), writes.q_BxNxHxK.shape[1]), readout


def _intervals(fixed: _Fixed, state: MemoryState, pieces: Writes) -> tuple[MemoryState, Readout]:
    """Whole intervals, `(P, B, N, ...)` each: all that does not decide what is stored is computed after the loop.

    Feedback and coherence of all intervals side by side; of the monitor, whose every interval starts anew, the last.
    """
    first, interval = state, pieces.q_BxNxHxK.shape[2]

    def body(carry: tuple[MemoryState, jax.Array], writes: Writes):
        before, _ = carry
        y_BxNxHxV, written, after = write(writes, before, fixed.config, fixed.implementation)
        # q and k are the stream's own; of v only what the delta rule made of it is new.
        new_v_BxNxHxV = written.v_BxNxHxV if fixed.config.plasticity == "delta" else None
        start_BxH = overlap(fixed.feedback_KxV, before.w_BxHxKxV)
        end_energy_BxH = jax.lax.stop_gradient(lyapunov.energy(after.w_BxHxKxV))
        refined = _advance(fixed.consolidate(consolidation.refine, after), interval)
        kept = (y_BxNxHxV, written.log_decay_BxNxH, written.eta_BxNxH, new_v_BxNxHxV, start_BxH, end_energy_BxH)
        return (refined, jax.lax.stop_gradient(before.w_BxHxKxV)), kept

    (state, last_w_BxHxKxV), kept = _loop(body, (state, jnp.zeros_like(state.w_BxHxKxV)), pieces)
    y_PxBxNxHxV, log_decay_PxBxNxH, eta_PxBxNxH, new_v_PxBxNxHxV, start_PxBxH, end_energy_PxBxH = kept
    v_PxBxNxHxV = pieces.v_BxNxHxV if new_v_PxBxNxHxV is None else new_v_PxBxNxHxV
    written = replace(pieces, v_BxNxHxV=v_PxBxNxHxV, log_decay_BxNxH=log_decay_PxBxNxH, eta_BxNxH=eta_PxBxNxH)

    in_rows = lambda x_PxB: x_PxB.reshape(-1, *x_PxB.shape[2:])  # noqa: E731
    f_RxN = feedback(jax.tree.map(in_rows, written), in_rows(start_PxBxH), fixed.feedback_KxV)
    f_PxBxN = f_RxN.reshape(y_PxBxNxHxV.shape[:3])
    bound_BxH = coherence(jax.tree.map(_joined, written), first.coherence_BxH)
    before = replace(first, w_BxHxKxV=last_w_BxHxKxV, position=state.position - interval)
    if y_PxBxNxHxV.shape[0] > 1:
        before = replace(before, lyapunov=lyapunov.opened(lyapunov.energy(last_w_BxHxKxV)))
    monitor = _observed(fixed, before, jax.tree.map(lambda x: x[-1], written))
    state = replace(state, coherence_BxH=bound_BxH, lyapunov=monitor)
    return consolidation.judge(state, end_energy_PxBxH[-1], fixed.config), (y_PxBxNxHxV, f_PxBxN)


def _any_piece(fixed: _Fixed, state: MemoryState, writes: Writes) -> tuple[MemoryState, Readout]:
    """At most an interval of tokens, after any of which a consolidation may fall."""
    length, interval = writes.q_BxNxHxK.shape[1], fixed.config.consolidation.interval
    until = interval - state.position % interval
    before_N = jnp.arange(length) < until
    state, readout = _stored(fixed, state, writes.only(before_N))
    consolidated = partial(fixed.consolidate, consolidation.consolidate)
    state = jax.lax.cond(until <= length, consolidated, lambda s: s, state)

    def rest(state: MemoryState, readout: Readout) -> tuple[MemoryState, Readout]:
        state, later = _stored(fixed, state, writes.only(~before_N))
        select = lambda a, b: jnp.where(before_N.reshape(1, length, *(1,) * (a.ndim - 2)), a, b)  # noqa: E731
        return state, jax.tree.map(select, readout, later)

    if length > 1:
        state, readout = jax.lax.cond(until < length, rest, lambda *same: same, state, readout)
    return _advance(state, length), readout
