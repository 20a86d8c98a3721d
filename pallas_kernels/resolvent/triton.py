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
import triton.language as tl

from pallas_kernels.complex_pairs import Pair
from pallas_kernels.resolvent.lanes import STEP, Backend
from pallas_kernels.triton_call import launch

# Lanes of a program: one warp, so that even few streams reach all multiprocessors.
_LANES = 32


@triton.jit
def _multiply(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _reciprocal(re, im):
    # As `complex_pairs.reciprocal`.
    size = tl.maximum(tl.abs(re), tl.abs(im))
    pole = size < 1e-10
    size = tl.where(pole, 1e-10, size)
    re = re / size
    im = tl.where(pole, -1.0, im / size)
    factor = 1.0 / (size * (re * re + im * im))
    return re * factor, -im * factor


@triton.jit
def _scale(largest):
    # A power of two that brings largest, a positive float, into [1/16, 1/8), by its exponent's bits.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 249)
    return ((250 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(a_re, a_im, b_re, b_im):
    return tl.maximum(tl.maximum(tl.abs(a_re), tl.abs(a_im)), tl.maximum(tl.abs(b_re), tl.abs(b_im)))


@triton.jit
def _then(pr, pi, qr, qi, rr, ri, sr, si, Pr, Pi, Qr, Qi, Rr, Ri, Sr, Si):
    # Product of the second matrix ((P, Q), (R, S)) with the first.
    nr = Pr * pr - Pi * pi + (Qr * rr - Qi * ri)
    ni = Pr * pi + Pi * pr + (Qr * ri + Qi * rr)
    mr = Pr * qr - Pi * qi + (Qr * sr - Qi * si)
    mi = Pr * qi + Pi * qr + (Qr * si + Qi * sr)
    dr = Rr * pr - Ri * pi + (Sr * rr - Si * ri)
    di = Rr * pi + Ri * pr + (Sr * ri + Si * rr)
    er = Rr * qr - Ri * qi + (Sr * sr - Si * si)
    ei = Rr * qi + Ri * qr + (Sr * si + Si * sr)
    scale = _scale(tl.maximum(_largest(nr, ni, mr, mi), _largest(dr, di, er, ei)))
    return nr * scale, ni * scale, mr * scale, mi * scale, dr * scale, di * scale, er * scale, ei * scale


@triton.jit
def _then_linear(ar, ai, fr, fi, Ar, Ai, Fr, Fi):
    # c -> A + F (a + f c).
    return Ar + Fr * ar - Fi * ai, Ai + Fr * ai + Fi * ar, Fr * fr - Fi * fi, Fr * fi + Fi * fr


@triton.jit
def _lanes(N: tl.constexpr, H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr):
    # Lanes, in the order (B, M, H); offset of their first token; tokens from it to the end of the sequence.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    head = lane % H
    chunk = (lane // H) % M
    batch = lane // (M * H)
    return lane, (batch * N + chunk * C) * H + head, N - chunk * C


@triton.jit
def _maps_kernel(
    x_re,
    x_im,
    u,
    maps,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    lane, first, left = _lanes(N, H, M, C, LANES)
    exists = lane < COUNT
    zero = tl.zeros((LANES,), tl.float32)
    pr, pi, qr, qi = zero + 1, zero, zero, zero
    rr, ri, sr, si = zero, zero, zero + 1, zero
    for block in range(C // STEP):
        loaded = ()
        for i in tl.static_range(STEP):
            t = block * STEP + i
            inside = exists & (t < left)
            where = first + t * H
            loaded += (
                tl.load(x_re + where, inside, other=1.0),
                tl.load(x_im + where, inside, other=0.0),
                tl.load(u + where, inside, other=0.0),
            )
        for i in tl.static_range(STEP):
            xr = loaded[3 * i]
            xi = loaded[3 * i + 1]
            ut = loaded[3 * i + 2]
            dr = xr * rr - xi * ri - ut * pr
            di = xr * ri + xi * rr - ut * pi
            er = xr * sr - xi * si - ut * qr
            ei = xr * si + xi * sr - ut * qi
            scale = _scale(tl.maximum(_largest(rr, ri, sr, si), _largest(dr, di, er, ei)))
            pr, pi, qr, qi = rr * scale, ri * scale, sr * scale, si * scale
            rr, ri, sr, si = dr * scale, di * scale, er * scale, ei * scale
    tl.store(maps + lane, pr, exists)
    tl.store(maps + COUNT + lane, pi, exists)
    tl.store(maps + 2 * COUNT + lane, qr, exists)
    tl.store(maps + 3 * COUNT + lane, qi, exists)
    tl.store(maps + 4 * COUNT + lane, rr, exists)
    tl.store(maps + 5 * COUNT + lane, ri, exists)
    tl.store(maps + 6 * COUNT + lane, sr, exists)
    tl.store(maps + 7 * COUNT + lane, si, exists)


@triton.jit
def _entries_kernel(
    maps,
    start_re,
    start_im,
    entry_re,
    entry_im,
    COUNT: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    stream = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    lane = (stream // H * M + chunk) * H + stream % H
    before = (chunk > 0) & (chunk < M)
    lane_before = maps + lane - H
    pr = tl.load(lane_before, before, other=1.0)
    pi = tl.load(lane_before + COUNT, before, other=0.0)
    qr = tl.load(lane_before + 2 * COUNT, before, other=0.0)
    qi = tl.load(lane_before + 3 * COUNT, before, other=0.0)
    rr = tl.load(lane_before + 4 * COUNT, before, other=0.0)
    ri = tl.load(lane_before + 5 * COUNT, before, other=0.0)
    sr = tl.load(lane_before + 6 * COUNT, before, other=1.0)
    si = tl.load(lane_before + 7 * COUNT, before, other=0.0)
    pr, pi, qr, qi, rr, ri, sr, si = tl.associative_scan((pr, pi, qr, qi, rr, ri, sr, si), 0, _then)
    gr = tl.load(start_re + stream)
    gi = tl.load(start_im + stream)
    dr, di = _reciprocal(rr * gr - ri * gi + sr, rr * gi + ri * gr + si)
    er, ei = _multiply(pr * gr - pi * gi + qr, pr * gi + pi * gr + qi, dr, di)
    tl.store(entry_re + lane, er, chunk < M)
    tl.store(entry_im + lane, ei, chunk < M)


@triton.jit
def _fractions_kernel(
    x_re,
    x_im,
    u,
    entry_re,
    entry_im,
    g_re,
    g_im,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    lane, first, left = _lanes(N, H, M, C, LANES)
    exists = lane < COUNT
    gr = tl.load(entry_re + lane, exists, other=0.0)
    gi = tl.load(entry_im + lane, exists, other=0.0)
    for block in range(C // STEP):
        loaded = ()
        for i in tl.static_range(STEP):
            t = block * STEP + i
            inside = exists & (t < left)
            where = first + t * H
            loaded += (
                tl.load(x_re + where, inside, other=1.0),
                tl.load(x_im + where, inside, other=0.0),
                tl.load(u + where, inside, other=0.0),
            )
        for i in tl.static_range(STEP):
            t = block * STEP + i
            inside = exists & (t < left)
            gr, gi = _reciprocal(loaded[3 * i] - loaded[3 * i + 2] * gr, loaded[3 * i + 1] - loaded[3 * i + 2] * gi)
            tl.store(g_re + first + t * H, gr, inside)
            tl.store(g_im + first + t * H, gi, inside)


@triton.jit
def _carries_kernel(
    u,
    g_re,
    g_im,
    cot_re,
    cot_im,
    carries,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    lane, first, left = _lanes(N, H, M, C, LANES)
    exists = lane < COUNT
    zero = tl.zeros((LANES,), tl.float32)
    ar, ai, fr, fi = zero, zero, zero + 1, zero
    for block in range(C // STEP):
        loaded = ()
        for i in tl.static_range(STEP):
            t = C - 1 - block * STEP - i
            inside = exists & (t < left)
            where = first + t * H
            loaded += (
                tl.load(u + where, inside, other=0.0),
                tl.load(g_re + where, inside, other=0.0),
                tl.load(g_im + where, inside, other=0.0),
                tl.load(cot_re + where, inside, other=0.0),
                tl.load(cot_im + where, inside, other=0.0),
            )
        for i in tl.static_range(STEP):
            ut = loaded[5 * i]
            sr, si = _multiply(loaded[5 * i + 1], loaded[5 * i + 2], loaded[5 * i + 1], loaded[5 * i + 2])
            ar, ai = _multiply(ut * sr, ut * si, loaded[5 * i + 3] + ar, loaded[5 * i + 4] + ai)
            fr, fi = _multiply(ut * sr, ut * si, fr, fi)
    tl.store(carries + lane, ar, exists)
    tl.store(carries + COUNT + lane, ai, exists)
    tl.store(carries + 2 * COUNT + lane, fr, exists)
    tl.store(carries + 3 * COUNT + lane, fi, exists)


@triton.jit
def _incoming_kernel(
    carries,
    incoming_re,
    incoming_im,
    COUNT: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # Chunks from the last to the first.
    stream = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CHUNKS)
    lane = (stream // H * M + M - 1 - place) * H + stream % H
    after = (place > 0) & (place < M)
    lane_after = carries + lane + H
    ar = tl.load(lane_after, after, other=0.0)
    ai = tl.load(lane_after + COUNT, after, other=0.0)
    fr = tl.load(lane_after + 2 * COUNT, after, other=1.0)
    fi = tl.load(lane_after + 3 * COUNT, after, other=0.0)
    ar, ai, fr, fi = tl.associative_scan((ar, ai, fr, fi), 0, _then_linear)
    tl.store(incoming_re + lane, ar, place < M)
    tl.store(incoming_im + lane, ai, place < M)


@triton.jit
def _adjoint_kernel(
    u,
    g_re,
    g_im,
    cot_re,
    cot_im,
    entry_re,
    entry_im,
    incoming_re,
    incoming_im,
    dx_re,
    dx_im,
    du,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    lane, first, left = _lanes(N, H, M, C, LANES)
    exists = lane < COUNT
    er = tl.load(entry_re + lane, exists, other=0.0)
    ei = tl.load(entry_im + lane, exists, other=0.0)
    cr = tl.load(incoming_re + lane, exists, other=0.0)
    ci = tl.load(incoming_im + lane, exists, other=0.0)
    for block in range(C // STEP):
        loaded = ()
        for i in tl.static_range(STEP):
            t = C - 1 - block * STEP - i
            inside = exists & (t < left)
            previous = exists & (t <= left) & (t > 0)
            where = first + t * H
            loaded += (
                tl.load(u + where, inside, other=0.0),
                tl.load(g_re + where, inside, other=0.0),
                tl.load(g_im + where, inside, other=0.0),
                tl.load(cot_re + where, inside, other=0.0),
                tl.load(cot_im + where, inside, other=0.0),
                tl.load(g_re + where - H, previous, other=0.0),
                tl.load(g_im + where - H, previous, other=0.0),
            )
        for i in tl.static_range(STEP):
            t = C - 1 - block * STEP - i
            inside = exists & (t < left)
            where = first + t * H
            br = tl.where(t > 0, loaded[7 * i + 5], er)
            bi = tl.where(t > 0, loaded[7 * i + 6], ei)
            sr, si = _multiply(loaded[7 * i + 1], loaded[7 * i + 2], loaded[7 * i + 1], loaded[7 * i + 2])
            sr, si = _multiply(sr, si, loaded[7 * i + 3] + cr, loaded[7 * i + 4] + ci)
            cr, ci = loaded[7 * i] * sr, loaded[7 * i] * si
            tl.store(dx_re + where, -sr, inside)
            tl.store(dx_im + where, si, inside)
            tl.store(du + where, sr * br - si * bi, inside)


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
    (found,) = launch(_maps_kernel, (*x, u), (maps,), **over_lanes)
    entry_re, entry_im = launch(_entries_kernel, (found, *initial_g), (entry, entry), grid=(streams,), **over_streams)
    g_re, g_im = launch(_fractions_kernel, (*x, u, entry_re, entry_im), (g, g), **over_lanes)
    return (g_re, g_im), (entry_re, entry_im)


def backward(u: jax.Array, g: Pair, entries: Pair, cotangent: Pair, chunk: int) -> tuple[Pair, jax.Array]:
    streams, over_lanes, over_streams = _sizes(u, chunk)
    carries = jax.ShapeDtypeStruct((4, *entries[0].shape), jnp.float32)
    incoming = jax.ShapeDtypeStruct(entries[0].shape, jnp.float32)
    plane = jax.ShapeDtypeStruct(u.shape, jnp.float32)
    (found,) = launch(_carries_kernel, (u, *g, *cotangent), (carries,), **over_lanes)
    coming = launch(_incoming_kernel, (found,), (incoming, incoming), grid=(streams,), **over_streams)
    dx_re, dx_im, du = launch(_adjoint_kernel, (u, *g, *cotangent, *entries, *coming), (plane,) * 3, **over_lanes)
    return (dx_re, dx_im), du


BACKEND = Backend(forward, backward)
