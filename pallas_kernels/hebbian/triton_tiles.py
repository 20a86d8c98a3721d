"""What the Triton kernels do with a chunk: its gates and its decays."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_gates(gates, chunk, C: tl.constexpr):
    """High and low sums, eta, and the decays from the entry, to the exit and over the whole of a chunk."""
    rows = gates + chunk * 3 * C
    place = tl.arange(0, C)
    high = tl.load(rows + place)
    low = tl.load(rows + C + place)
    strength = tl.load(rows + 2 * C + place)
    last_high = tl.load(rows + C - 1)
    last_low = tl.load(rows + 2 * C - 1)
    from_entry = tl.exp2(high + low)
    to_exit = tl.exp2((last_high - high) + (last_low - low))
    return high, low, strength, from_entry, to_exit, tl.exp2(last_high + last_low)


@triton.jit
def decayed(scores, high, low, C: tl.constexpr, LATER: tl.constexpr):
    """Scores times the decays from column to row, with LATER from row to column; 0 where time would run backwards."""
    place = tl.arange(0, C)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    # Masked after exp2, which overflows on the other side of the diagonal.
    if LATER:
        return tl.where(place[None, :] >= place[:, None], scores * tl.exp2(-between), 0.0)
    else:
        return tl.where(place[None, :] <= place[:, None], scores * tl.exp2(between), 0.0)
