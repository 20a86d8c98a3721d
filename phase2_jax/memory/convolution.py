"""Short causal depthwise convolution on a stream, with document boundaries, followed by SiLU."""

import jax
import jax.numpy as jnp
import numpy as np


def causal_convolution(
    x_BxNxC: jax.Array, taps_TxC: jax.Array, tail_BxSxC: jax.Array, reset_BxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y_t = SiLU(Σ_j taps_j ⊙ x_{t−j}) over the tokens of the same document.

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
    document_BxM = jnp.pad(jnp.cumsum(reset_BxN, axis=1), ((0, 0), (width - 1, 0)))
    y_BxNxC = _silu_convolution(extended_BxMxC, taps_TxC.astype(x_BxNxC.dtype), document_BxM)
    same_BxS = document_BxM[:, num_tokens:] == document_BxM[:, -1:]
    new_tail_BxSxC = jnp.where(same_BxS[..., None], extended_BxMxC[:, num_tokens:], 0)
    return y_BxNxC, new_tail_BxSxC.astype(tail_BxSxC.dtype)


def _convolve(extended_BxMxC: jax.Array, taps_TxC: jax.Array, document_BxM: jax.Array) -> jax.Array:
    back = taps_TxC.shape[0] - 1
    y_BxNxC = extended_BxMxC[:, back:] * taps_TxC[0]
    for j, same_BxN in enumerate(_same_document(document_BxM, back + 1)[1:], start=1):
        shifted_BxNxC = extended_BxMxC[:, back - j : back - j + same_BxN.shape[1]]
        y_BxNxC += jnp.where(same_BxN[..., None], shifted_BxNxC, 0) * taps_TxC[j]
    return y_BxNxC


def _same_document(document_BxM: jax.Array, width: int) -> list[jax.Array]:
    """For each tap j whether token t and token t − j belong to one document, `(B, N)`."""
    num_tokens = document_BxM.shape[1] - (width - 1)
    here_BxN = document_BxM[:, width - 1 :]
    return [document_BxM[:, width - 1 - j : width - 1 - j + num_tokens] == here_BxN for j in range(width)]


# The derivative is written out because the transposed program of _convolve holds a padded copy for every tap and is
# merged into its consumers, which then repeat it: half of the memory branch's time on a CPU.
@jax.custom_vjp
def _silu_convolution(extended_BxMxC: jax.Array, taps_TxC: jax.Array, document_BxM: jax.Array) -> jax.Array:
    return jax.nn.silu(_convolve(extended_BxMxC, taps_TxC, document_BxM))


def _forward(extended_BxMxC, taps_TxC, document_BxM):
    return _silu_convolution(extended_BxMxC, taps_TxC, document_BxM), (extended_BxMxC, taps_TxC, document_BxM)


def _backward(residuals, dy_BxNxC):
    extended_BxMxC, taps_TxC, document_BxM = residuals
    width, num_tokens = taps_TxC.shape[0], dy_BxNxC.shape[1]
    c_BxNxC = _convolve(extended_BxMxC, taps_TxC, document_BxM)
    gate_BxNxC = jax.nn.sigmoid(c_BxNxC)
    dc_BxNxC = jax.lax.optimization_barrier(dy_BxNxC * gate_BxNxC * (1 + c_BxNxC * (1 - gate_BxNxC)))
    same = _same_document(document_BxM, width)
    # Position m of the extended input is read by tap j at token m − (T − 1) + j.
    around = ((0, 0), (width - 1, width - 1), (0, 0))
    dc_padded = jnp.pad(dc_BxNxC, around)
    length = num_tokens + width - 1
    dextended_BxMxC = sum(
        jnp.where(jnp.pad(same[j], around[:2])[:, j : j + length, None], dc_padded[:, j : j + length], 0) * taps_TxC[j]
        for j in range(width)
    )
    dtaps = [
        jnp.sum(
            jnp.where(same[j][..., None], extended_BxMxC[:, width - 1 - j : width - 1 - j + num_tokens], 0) * dc_BxNxC,
            axis=(0, 1),
            dtype=jnp.promote_types(dc_BxNxC.dtype, jnp.float32),
        )
        for j in range(width)
    ]
    dextended_BxMxC = jax.lax.optimization_barrier(dextended_BxMxC)
    return dextended_BxMxC, jnp.stack(dtaps).astype(taps_TxC.dtype), np.zeros(document_BxM.shape, jax.dtypes.float0)


_silu_convolution.defvjp(_forward, _backward)
