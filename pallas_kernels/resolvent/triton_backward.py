"""Triton kernels of the resolvent scan's backward: the three passes of `lanes.py`."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.resolvent.triton_forward import lanes_of, multiply


@triton.jit
def _then_linear(ar, ai, fr, fi, Ar, Ai, Fr, Fi):
    # c -> A + F (a + f c).
    return Ar + Fr * ar - Fi * ai, Ai + Fr * ai + Fi * ar, Fr * fr - Fi * fi, Fr * fi + Fi * fr


@triton.jit
def carries_kernel(
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
    lane, first, left = lanes_of(N, H, M, C, LANES)
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
            sr, si = multiply(loaded[5 * i + 1], loaded[5 * i + 2], loaded[5 * i + 1], loaded[5 * i + 2])
            ar, ai = multiply(ut * sr, ut * si, loaded[5 * i + 3] + ar, loaded[5 * i + 4] + ai)
            fr, fi = multiply(ut * sr, ut * si, fr, fi)
    tl.store(carries + lane, ar, exists)
    tl.store(carries + COUNT + lane, ai, exists)
    tl.store(carries + 2 * COUNT + lane, fr, exists)
    tl.store(carries + 3 * COUNT + lane, fi, exists)


@triton.jit
def incoming_kernel(
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
def adjoint_kernel(
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
    lane, first, left = lanes_of(N, H, M, C, LANES)
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
            sr, si = multiply(loaded[7 * i + 1], loaded[7 * i + 2], loaded[7 * i + 1], loaded[7 * i + 2])
            sr, si = multiply(sr, si, loaded[7 * i + 3] + cr, loaded[7 * i + 4] + ci)
            cr, ci = loaded[7 * i] * sr, loaded[7 * i] * si
            tl.store(dx_re + where, -sr, inside)
            tl.store(dx_im + where, si, inside)
            tl.store(du + where, sr * br - si * bi, inside)
