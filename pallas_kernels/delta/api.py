"""delta_scan: argument checks, the corrected values, and the Hebbian scan that stores and reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.chunking import pad_tokens
from pallas_kernels.delta import chunked, naive
from pallas_kernels.delta.walk import Walk, plain
from pallas_kernels.hebbian.api import check_scan, choose, hebbian_scan, results_placed_like

# Tokens that one Hebbian scan takes before it starts again from the state of the corrections. Its kernels round each
# write to bfloat16; here writes cancel each other, and what rounding leaves of them would add up over the sequence.
SEGMENT = 4 * chunked.CHUNK


def _fold(x: jax.Array) -> jax.Array:
    """(B, N, ...) to (B S, SEGMENT, ...), zeros at the end."""
    x = pad_tokens(x, SEGMENT)
    return x.reshape(-1, SEGMENT, *x.shape[2:])


def _stored_and_read(q, k, u, log_decay, eta, entries_BxHxMxKxV, reset, implementation):
    """y and final state of the Hebbian memory with values u, in segments that begin at every fourth of the entries."""
    batch, num_tokens = q.shape[:2]
    if num_tokens <= SEGMENT:
        return hebbian_scan(
            q, k, u, log_decay, eta, entries_BxHxMxKxV[:, :, 0], reset=reset, implementation=implementation
        )
    starts = jnp.moveaxis(entries_BxHxMxKxV[:, :, :: SEGMENT // chunked.CHUNK], 2, 1)
    q, k, u, log_decay, eta = (_fold(x) for x in (q, k, u, log_decay, eta))
    y, finals = hebbian_scan(
        q,
        k,
        u,
        log_decay,
        eta,
        starts.reshape(-1, *starts.shape[2:]),
        reset=None if reset is None else _fold(reset),
        implementation=implementation,
    )
    y = y.reshape(batch, -1, *y.shape[2:])[:, :num_tokens]
    return y, finals.reshape(starts.shape)[:, -1]


def _walk(chosen: registry.Implementation, num_tokens: int, state_BxHxKxV: jax.Array) -> Walk:
    """How the corrections go from chunk to chunk: as one kernel where the scan is one and the sizes allow it."""
    if not chosen.kernel or not registry.has_triton() or state_BxHxKxV.dtype != jnp.float32:
        return plain
    # Imported on use: it needs jax-triton.
    from pallas_kernels.delta import triton_walk

    suits = set(state_BxHxKxV.shape[2:]) <= set(triton_walk.WIDTHS) and num_tokens >= triton_walk.SHORTEST
    return triton_walk.walk if suits else plain


def delta_scan_with_values(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay: jax.Array,
    eta: jax.Array | float,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """delta_scan that also returns the corrected values u (B, N, H, V) in v's dtype.

    W_t = exp(log_decay_t) W_{t-1} + eta_t k_t u_t^T: whatever is linear in the writes of a Hebbian memory holds for
    this one with u in the place of v. Arguments, the other results and what is raised are those of delta_scan.
    """
    arrays = check_scan("delta_scan", q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay, eta, initial_state, reset)
    chosen = choose("delta_scan", arrays, implementation)

    def run(*arrays):
        if implementation == "naive":
            return naive.scan(*arrays)
        q, k, v, log_decay_BxNxH, eta_BxNxH, state, reset = arrays
        walk = _walk(chosen, k.shape[1], state)
        with jax.named_scope("delta_correction"):
            u, entries = chunked.corrected_values(k, v, log_decay_BxNxH, eta_BxNxH, state, reset, walk=walk)
        y, final = _stored_and_read(q, k, u, log_decay_BxNxH, eta_BxNxH, entries, reset, implementation)
        return y, final, u

    y_place, state_place = results_placed_like(v_BxNxHxV)
    return registry.place_freely(run, y_place, state_place, y_place)(*registry.vary_alike(arrays))


def delta_scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay: jax.Array,
    eta: jax.Array | float,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Error-correcting memory over a sequence, the gated delta rule:

        u_t = v_t - exp(log_decay_t) W_{t-1}^T k_t
        W_t = exp(log_decay_t) W_{t-1} + eta_t k_t u_t^T
        y_t = W_t^T q_t

    so that a write replaces what the memory answered to its key instead of adding to it (Schlag et al. 2021, "Linear
    Transformers Are Secretly Fast Weight Programmers"; Yang et al. 2024, "Gated Delta Networks").

    Args:
      q_BxNxHxK, k_BxNxHxK, v_BxNxHxV: queries, keys, values; bfloat16, float16, float32 or float64; N >= 1, V
        may differ from K. Old content fades by I - eta k k^T, which never grows it where eta ||k||^2 <= 2: longer keys
        or larger eta let the memory grow without bound.
      log_decay: (B, N, H), or (B, N, 1) for all heads alike; float32, finite, <= 0; minus (rate x time) per token.
      eta: share of the error that is corrected, a float or anything that broadcasts to (B, N, H).
      initial_state: (B, H, K, V), the memory before the first token; None is an empty one.
      reset: (B, N) bool; True wipes the memory just before that token.
      implementation: of the Hebbian scan that stores and reads the corrected values, as in hebbian_scan; "naive" takes
        the law a token at a time. With "mosaic" and "triton" the corrections' walk from chunk to chunk is a Triton
        kernel for K and V of 16, 32, 64 and 128, where jax-triton is installed.

    Returns:
      y (B, N, H, V) in v's dtype, read after the write of the same token, and the final state (B, H, K, V) in float32.
      With any of q, k, v in float64 everything is computed and returned in float64. The corrected values are rounded
      to v's dtype, so that the kernels for bfloat16 take them; what that loses, later corrections make good.

    Differentiable in every floating argument, through both results.

    Raises:
      ValueError: for shapes or dtypes other than these, and for an implementation that cannot run the call.
    """
    y_BxNxHxV, final_BxHxKxV, _ = delta_scan_with_values(
        q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay, eta, initial_state, reset=reset, implementation=implementation
    )
    return y_BxNxHxV, final_BxHxKxV
