"""Short causal depthwise convolution on a stream, with document boundaries."""

import jax
import jax.numpy as jnp


def causal_convolution(
    x_BxNxC: jax.Array, taps_TxC: jax.Array, tail_BxSxC: jax.Array, reset_BxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y_t = Σ_j taps_j ⊙ x_{t−j} over the tokens of the same document.

    Args:
      x_BxNxC: inputs.
      taps_TxC: taps, index j reaches j tokens back.
      tail_BxSxC: the S = T − 1 inputs before the first one, oldest first, zeros where they belong to another document.
      reset_BxN: True where a document begins.

    Returns:
      outputs `(B, N, C)` and the tail for the next call.
    """
    num_tokens, width = x_BxNxC.shape[1], taps_TxC.shape[0]
    extended_BxMxC = jnp.concatenate([tail_BxSxC.astype(x_BxNxC.dtype), x_BxNxC], axis=1)
    document_BxN = jnp.cumsum(reset_BxN, axis=1)
    document_BxM = jnp.pad(document_BxN, ((0, 0), (width - 1, 0)))
    y_BxNxC = x_BxNxC * taps_TxC[0].astype(x_BxNxC.dtype)
    for back in range(1, width):
        start = width - 1 - back
        same_BxN = document_BxM[:, start : start + num_tokens] == document_BxN
        shifted_BxNxC = extended_BxMxC[:, start : start + num_tokens]
        y_BxNxC += jnp.where(same_BxN[..., None], shifted_BxNxC, 0) * taps_TxC[back].astype(x_BxNxC.dtype)
    same_BxS = document_BxM[:, num_tokens:] == document_BxN[:, -1:]
    new_tail_BxSxC = jnp.where(same_BxS[..., None], extended_BxMxC[:, num_tokens:], 0)
    return y_BxNxC, new_tail_BxSxC.astype(tail_BxSxC.dtype)
