"""`narrow.recurrence` as one Triton kernel, for NVIDIA GPUs from sm_80, in float32.

The numbers of all states of a token are its columns, neighbours in memory. A program takes some columns of one batch
row through all tokens, a block of them at a time, in lanes of a few tokens: each lane finds what its tokens make of an
empty state, a scan over the lanes gives the state that enters each, and from there they go through their tokens again.
Stretches are joined by their log decays: factors exp(a) are all rounded the same way where the decay is slow and
constant, and a product of hundreds would be off by the sum.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.batching import over_rows
from pallas_kernels.triton_call import launch

# A sector of 32 bytes in float32.
_COLUMNS = 8
# Programs that are better than whole sectors: about one for each multiprocessor.
_ENOUGH = 128
# Tokens of a lane, which it loads together.
_STEP = 8
# Lanes of a program, those of all its columns together: one a thread.
_LANES = 256
# A log decay whose factor is 0 in float32.
_GONE = tl.constexpr(-128.0)


@triton.jit
def _factors(log_decay):
    """What `decays.decayed` multiplies with, in two parts: 1 and expm1 of a slow decay, a series good to 1e-8."""
    a = log_decay
    series = 1 / 24 + a * (1 / 120 + a * (1 / 720 + a * (1 / 5040 + a * (1 / 40320))))
    series = a * (1 + a * (1 / 2 + a * (1 / 6 + a * series)))
    slow = a > -0.5
    return tl.where(slow, 1.0, 0.0), tl.where(slow, series, tl.exp(a))


@triton.jit
def _after(log_decay, added, x):
    whole, rest = _factors(log_decay)
    return whole * x + (rest * x + added)


@triton.jit
def _then(before, added_before, log_decay, added, later_before, later_added_before, later_log_decay, later_added):
    """Two stretches in a row as one: how a state decays in all but its last lane and in all, and what they add."""
    return (
        log_decay + later_before,
        _after(later_before, later_added_before, added),
        log_decay + later_log_decay,
        _after(later_log_decay, later_added, added),
    )


@triton.jit
def _row(batch, order, TOKENS: tl.constexpr, REVERSE: tl.constexpr):
    """Row of the arrays (B N, ...) with the token that a state passes at such a place of its way."""
    token = order
    if REVERSE:
        token = TOKENS - 1 - order
    return batch * TOKENS + token


@triton.jit
def _load(
    log_decay,
    cut,
    added,
    batch,
    order,
    column,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    CUT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Log decay of what comes to a token of each lane, and what the token adds to it: (LANES, COLUMNS)."""
    row = _row(batch, order, TOKENS, REVERSE)
    known = order < TOKENS
    real = (column < HEADS * SIZE)[None, :]
    # By its own gate; in reverse by that of the token after it, the last by none.
    gate = row
    gated = known
    if REVERSE:
        gate = row + 1
        gated = known & (order > 0)
    gates = gate[:, None] * HEADS + (column // SIZE)[None, :]
    decay = tl.load(log_decay + gates, mask=gated[:, None] & real, other=0.0)
    if CUT:
        wiped = tl.load(cut + gate, mask=gated, other=0)
        decay = tl.where(wiped[:, None] != 0, _GONE, decay)
    places = row[:, None] * (HEADS * SIZE) + column[None, :]
    return decay, tl.load(added + places, mask=known[:, None] & real, other=0.0)


@triton.jit
def recurrence_kernel(
    log_decay,
    cut,
    added,
    initial,
    states,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
    CUT: tl.constexpr,
    INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    # One axis for both: only the first may pass 65,535 programs.
    width: tl.constexpr = HEADS * SIZE
    parts: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    batch = (tl.program_id(0) // parts).to(tl.int64)
    # Were they known to be neighbours, Triton would exchange every tile between a layout for memory and one for scans.
    column = tl.max_contiguous(column, [1])
    lane = tl.arange(0, LANES)
    zero = tl.zeros((LANES, COLUMNS), tl.float32)
    carried = tl.zeros((COLUMNS,), tl.float32)
    if INITIAL:
        carried = tl.load(initial + batch * width + column, mask=column < width, other=0.0)
    for first in range(0, TOKENS, LANES * STEP):
        # All loads before the first use, as nothing else hides their latencies.
        steps = ()
        writes = ()
        for i in tl.static_range(STEP):
            order = first + lane * STEP + i
            step, write = _load(log_decay, cut, added, batch, order, column, TOKENS, HEADS, SIZE, CUT, REVERSE)
            steps += (step,)
            writes += (write,)
        total, local = zero, zero
        factors = ()
        for i in tl.static_range(STEP):
            whole, rest = _factors(steps[i])
            factors += (whole, rest)
            total += steps[i]
            local = whole * local + (rest * local + writes[i])
        before, added_before, total, local = tl.associative_scan((zero, zero, total, local), 0, _then)
        state = _after(before, added_before, carried[None, :])
        ends = _after(total, local, carried[None, :])
        carried = tl.sum(tl.where((lane == LANES - 1)[:, None], ends, 0.0), axis=0)
        for i in tl.static_range(STEP):
            order = first + lane * STEP + i
            state = factors[2 * i] * state + (factors[2 * i + 1] * state + writes[i])
            places = _row(batch, order, TOKENS, REVERSE)[:, None] * width + column[None, :]
            tl.store(states + places, state, mask=(order < TOKENS)[:, None] & (column < width)[None, :])


def _plan(rows: int, width: int, tokens: int) -> tuple[int, int]:
    """Columns and lanes of a program, for so many columns in each of the batch's rows."""
    spare = max(rows * width // _ENOUGH, 1)
    columns = min(1 << (spare.bit_length() - 1), triton.next_power_of_2(width), _COLUMNS)
    lanes = triton.next_power_of_2(triton.cdiv(tokens, _STEP))
    return columns, max(min(lanes, _LANES // columns), 32 // columns)


def _launch(log_decay, cut, added, initial, *, reverse: bool) -> jax.Array:
    batch, tokens, heads, keys, values = added.shape
    size = keys * values
    columns, lanes = _plan(batch, heads * size, tokens)
    (states,) = launch(
        recurrence_kernel,
        (log_decay, log_decay if cut is None else cut, added, added if initial is None else initial),
        (jax.ShapeDtypeStruct(added.shape, jnp.float32),),
        grid=(batch * triton.cdiv(heads * size, columns),),
        num_warps=lanes * columns // 32,
        TOKENS=tokens,
        HEADS=heads,
        SIZE=size,
        COLUMNS=columns,
        LANES=lanes,
        STEP=_STEP,
        CUT=cut is not None,
        INITIAL=initial is not None,
        REVERSE=reverse,
    )
    return states


def recurrence(
    log_decay_BxNxH: jax.Array,
    cut_BxNx1: jax.Array | None,
    added_BxNxHxKxV: jax.Array,
    initial_BxHxKxV: jax.Array | None,
    reverse: bool,
) -> jax.Array:
    """`narrow.recurrence`: all states (B, N, H, K, V), float32 as all but the cuts, which are bool."""
    run = over_rows(functools.partial(_launch, reverse=reverse))
    return run(log_decay_BxNxH, cut_BxNx1, added_BxNxHxKxV, initial_BxHxKxV)
