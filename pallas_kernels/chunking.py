"""Cutting the token axis into chunks, shared by the chunked forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import registry

# Steps of a walk that a GPU runs as one kernel: a step is a few operations on small arrays, a kernel's launch dearer.
WALK_UNROLL = 16


def lane_chunk_length(num_tokens: int) -> int:
    """Chunk length for the forms that walk all chunks side by side, one lane a chunk.

    They take two walks of length C inside the chunks and one of length N / C over them: 2 C + N / C sequential steps,
    least at C = sqrt(N / 2).
    """
    return min(num_tokens, math.ceil(math.sqrt(num_tokens / 2)))


def walk(body: Callable[..., Any], start: Any, steps: Any, reverse: bool = False) -> tuple[Any, Any]:
    """jax.lax.scan for bodies of a few elementwise operations."""
    unroll = 1 if registry.default_device().platform == "cpu" else WALK_UNROLL
    return jax.lax.scan(body, start, steps, reverse=reverse, unroll=unroll)


def pad_tokens(x: jax.Array, chunk: int, value: float = 0.0) -> jax.Array:
    """(B, N, ...) padded at the end of axis 1 to a multiple of chunk."""
    missing = -x.shape[1] % chunk
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def split_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, M C, H, ...) to (B, H, M, C, ...)."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], x.shape[2] // chunk, chunk, *x.shape[3:])


def join_chunks(x: jax.Array) -> jax.Array:
    """Inverse of split_chunks."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:]), 1, 2)


def to_lanes(x: jax.Array, chunk: int) -> jax.Array:
    """(B, M C, ...) to (C, B, M, ...): position inside the chunk first, chunks as lanes."""
    batch, num_tokens = x.shape[:2]
    split = x.reshape(batch, num_tokens // chunk, chunk, *x.shape[2:])
    return jnp.moveaxis(split, 2, 0)


def from_lanes(x: jax.Array, num_tokens: int) -> jax.Array:
    """Inverse of to_lanes, without the padding: (C, B, M, ...) to (B, N, ...)."""
    moved = jnp.moveaxis(x, 0, 2)
    joined = moved.reshape(moved.shape[0], moved.shape[1] * moved.shape[2], *moved.shape[3:])
    return joined[:, :num_tokens]
