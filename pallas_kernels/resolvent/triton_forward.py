"""Triton kernels of the resolvent scan's forward: the three passes of `lanes.py`."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a_re, a_im, b_re, b_im):
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
def lanes_of(N: tl.constexpr, H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr):
    # Lanes, in the order (B, M, H); offset of their first token; tokens from it to the end of the sequence.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    head = lane % H
    chunk = (lane // H) % M
    batch = lane // (M * H)
    return lane, (batch * N + chunk * C) * H + head, N - chunk * C


@triton.jit
def maps_kernel(
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
    lane, first, left = lanes_of(N, H, M, C, LANES)
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
def entries_kernel(
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
    er, ei = multiply(pr * gr - pi * gi + qr, pr * gi + pi * gr + qi, dr, di)
    tl.store(entry_re + lane, er, chunk < M)
    tl.store(entry_im + lane, ei, chunk < M)


@triton.jit
def fractions_kernel(
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
    lane, first, left = lanes_of(N, H, M, C, LANES)
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
