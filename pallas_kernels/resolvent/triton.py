"""The passes of `lanes.py` as Triton kernels through jax-triton, for NVIDIA GPUs from sm_80, in float32.

A lane is a chunk of one head; neighbouring lanes are heads of the same chunk, whose values are neighbours in memory.
Tokens are loaded STEP at a time before the first is used: the recursions leave nothing else to hide latencies with.
"""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton

from pallas_kernels.complex_pairs import Pair
from pallas_kernels.resolvent.lanes import STEP, Backend
from pallas_kernels.resolvent.triton_backward import adjoint_kernel, carries_kernel, incoming_kernel
from pallas_kernels.resolvent.triton_forward import entries_kernel, fractions_kernel, maps_kernel
from pallas_kernels.triton_call import launch

# Lanes of a program: one warp, so that even few streams reach all multiprocessors.
_LANES = 32


def _sizes(u: jax.Array, chunk: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Streams, and the constants of the kernels over lanes and of those over streams."""
    batch, num_tokens, heads = u.shape
    chunks = -(-num_tokens // chunk)
    count = batch * chunks * heads
    shared = {"COUNT": count, "H": heads, "M": chunks}
    over_lanes = {**shared, "N": num_tokens, "C": chunk, "STEP": STEP, "LANES": _LANES, "num_warps": _LANES // 32}
    tile = max(128, triton.next_power_of_2(chunks))
    return batch * heads, {**over_lanes, "grid": (-(-count // _LANES),)}, {**shared, "CHUNKS": tile, "num_warps": 4}


def forward(x: Pair, u: jax.Array, initial_g: Pair, chunk: int) -> tuple[Pair, Pair]:
    streams, over_lanes, over_streams = _sizes(u, chunk)
    batch, _, heads = u.shape
    maps = jax.ShapeDtypeStruct((8, batch, over_lanes["M"], heads), jnp.float32)
    entry = jax.ShapeDtypeStruct(maps.shape[1:], jnp.float32)
    g = jax.ShapeDtypeStruct(u.shape, jnp.float32)
    (found,) = launch(maps_kernel, (*x, u), (maps,), **over_lanes)
    entry_re, entry_im = launch(entries_kernel, (found, *initial_g), (entry, entry), grid=(streams,), **over_streams)
    g_re, g_im = launch(fractions_kernel, (*x, u, entry_re, entry_im), (g, g), **over_lanes)
    return (g_re, g_im), (entry_re, entry_im)


def backward(u: jax.Array, g: Pair, entries: Pair, cotangent: Pair, chunk: int) -> tuple[Pair, jax.Array]:
    streams, over_lanes, over_streams = _sizes(u, chunk)
    carries = jax.ShapeDtypeStruct((4, *entries[0].shape), jnp.float32)
    incoming = jax.ShapeDtypeStruct(entries[0].shape, jnp.float32)
    plane = jax.ShapeDtypeStruct(u.shape, jnp.float32)
    (found,) = launch(carries_kernel, (u, *g, *cotangent), (carries,), **over_lanes)
    coming = launch(incoming_kernel, (found,), (incoming, incoming), grid=(streams,), **over_streams)
    dx_re, dx_im, du = launch(adjoint_kernel, (u, *g, *cotangent, *entries, *coming), (plane,) * 3, **over_lanes)
    return (dx_re, dx_im), du


BACKEND = Backend(forward, backward)
