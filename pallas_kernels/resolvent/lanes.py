"""The resolvent scan in the form that the GPU kernels take: short chunks, one lane each, and a scan over their maps.

A site acts on g = n / d as the companion matrix (n, d) <- (d, x d - u n). Pass 1 multiplies those of every chunk, kept
in range by powers of two; pass 2 scans the chunks' matrices of a stream, which gives the g that enters every chunk;
pass 3 runs the continued fraction inside the chunks. The backward is built likewise: in complex cotangents, as in
`chunked.py`, what a site hands to the one before it is
    carry_t = u_t g_t^2 (cotangent_t + carry_{t+1}),
linear in the carry that enters a chunk from its end. Kept for it are g and the g that enters every chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from pallas_kernels.batching import over_rows
from pallas_kernels.complex_pairs import Pair

# A stream's chunks are scanned at once; that many fit the registers of a program.
_MOST_CHUNKS = 1024
# Tokens that a lane loads together.
STEP = 8


@dataclasses.dataclass(frozen=True)
class Backend:
    """forward(x, u, initial_g, chunk) is g and the g that enters every chunk, pairs of (B, N, H) and (B, M, H);
    backward(u, g, entries, cotangent, chunk) the cotangents of x, a pair, and of u.
    """

    forward: Callable[[Pair, jax.Array, Pair, int], tuple[Pair, Pair]]
    backward: Callable[[jax.Array, Pair, Pair, Pair, int], tuple[Pair, jax.Array]]


def chunk_length(num_tokens: int) -> int:
    """Tokens of a chunk, a multiple of STEP: 32 keep a GPU busy, more where there would be too many chunks."""
    least = min(num_tokens, max(32, -(-num_tokens // _MOST_CHUNKS)))
    return -(-least // STEP) * STEP


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(x: Pair, u: jax.Array, initial_g: Pair, backend: Backend) -> Pair:
    return _scan_fwd(x, u, initial_g, backend)[0]


def _scan_fwd(x: Pair, u: jax.Array, initial_g: Pair, backend: Backend):
    chunk = chunk_length(u.shape[1])
    g, entries = over_rows(lambda x, u, initial_g: backend.forward(x, u, initial_g, chunk))(x, u, initial_g)
    return g, (u, g, entries)


def _scan_bwd(backend: Backend, residuals, cotangent: Pair):
    u, g, entries = residuals
    chunk = chunk_length(u.shape[1])
    # The complex number c with dF = Re(c dg) is F_re - i F_im.
    passes = over_rows(lambda u, g, entries, c: backend.backward(u, g, entries, c, chunk))
    dx, du = passes(u, g, entries, (cotangent[0], -cotangent[1]))
    # dg_0 / dinitial = u_0 g_0^2, and dx_0 = -g_0^2 times the same cotangent.
    return dx, du, (-u[:, 0] * dx[0][:, 0], -u[:, 0] * dx[1][:, 0])


_scan.defvjp(_scan_fwd, _scan_bwd)


def scan(x: Pair, u_BxNxH: jax.Array, initial_g: Pair, *, backend: Backend) -> Pair:
    """g_t = 1 / (x_t - u_t g_{t-1}) by passes of one backend; arguments and result as naive.scan."""
    return _scan(x, u_BxNxH, initial_g, backend)
