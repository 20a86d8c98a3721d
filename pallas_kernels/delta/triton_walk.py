"""The walk of `walk.py` as one Triton kernel, for NVIDIA GPUs from sm_80: a state stays in registers over all chunks.

What the plain form launches for every chunk, some eight kernels of a few microseconds, takes a step of a loop here.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.batching import over_rows
from pallas_kernels.delta.walk import Steps
from pallas_kernels.triton_call import launch

# Of K and V; tiles of wider ones leave shared memory no room.
WIDTHS = (16, 32, 64, 128)
# Tokens from which a chunk has the rows that a matrix instruction wants.
SHORTEST = 16
# Columns of the state in a program.
_BLOCK = 32


@triton.jit
def walk_kernel(
    added,
    first,
    second,
    gates,
    start,
    joining,
    out,
    states,
    end,
    CHUNKS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BACK: tl.constexpr,
):
    block = tl.program_id(0) % (V // BV)
    stream = (tl.program_id(0) // (V // BV)).to(tl.int64)
    place = tl.arange(0, C)
    keys = tl.arange(0, K)
    values = block * BV + tl.arange(0, BV)
    key_offsets = place[:, None] * K + keys[None, :]
    value_offsets = place[:, None] * V + values[None, :]
    state_offsets = keys[:, None] * V + values[None, :]
    state = tl.load(start + stream * K * V + state_offsets)
    for step in range(CHUNKS):
        chunk = stream * CHUNKS + step
        if BACK:
            chunk = stream * CHUNKS + CHUNKS - 1 - step
        first_tile = tl.load(first + chunk * C * K + key_offsets)
        second_tile = tl.load(second + chunk * C * K + key_offsets)
        x = tl.load(added + chunk * C * V + value_offsets)
        stays = tl.load(gates + 2 * chunk)
        factor = tl.load(gates + 2 * chunk + 1)
        tl.store(states + chunk * K * V + state_offsets, state)
        found = tl.dot(first_tile, state, input_precision="tf32x3")
        if BACK:
            x = x + found
        else:
            x = x - found
        rounded = x.to(out.dtype.element_ty)
        tl.store(out + chunk * C * V + value_offsets, rounded)
        moved = tl.dot(tl.trans(second_tile), rounded.to(tl.float32), input_precision="tf32x3")
        state = stays * state + factor * state
        if BACK:
            state = state - moved + tl.load(joining + chunk * K * V + state_offsets)
        else:
            state = state + moved
    tl.store(end + stream * K * V + state_offsets, state)


def _gates(steps: Steps) -> jax.Array:
    """Stays and factor of every chunk (B, H, M, 2): S <- stays S + factor S, as `decays.decayed` has it."""
    slow = steps.log_whole > -0.5
    factor = jnp.where(slow, jnp.expm1(jnp.where(slow, steps.log_whole, 0)), jnp.exp(steps.log_whole))
    gates = jnp.stack([slow.astype(factor.dtype), factor], axis=-1)
    return gates if steps.survives is None else jnp.where(steps.survives[:, None, :, None], gates, 0)


def walk(steps: Steps, start: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A `walk.Walk` for K and V of WIDTHS, chunks of SHORTEST tokens or more and float32 states; vmap adds rows."""
    back = steps.joining is not None
    first, second = (steps.write, steps.read) if back else (steps.read, steps.write)

    def run(added, first, second, gates, start, joining):
        batch, heads, chunks, length, values = added.shape
        block = min(values, _BLOCK)
        return launch(
            walk_kernel,
            (added, first, second, gates, start, start if joining is None else joining),
            (
                jax.ShapeDtypeStruct(added.shape, dtype),
                jax.ShapeDtypeStruct((batch, heads, chunks, *start.shape[2:]), start.dtype),
                jax.ShapeDtypeStruct(start.shape, start.dtype),
            ),
            grid=(values // block * batch * heads,),
            num_warps=4,
            num_stages=2,
            CHUNKS=chunks,
            C=length,
            K=start.shape[2],
            V=values,
            BV=block,
            BACK=back,
        )

    return tuple(over_rows(run)(steps.added, first, second, _gates(steps), start, steps.joining))
