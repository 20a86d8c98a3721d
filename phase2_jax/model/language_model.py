"""The language model: one pure function of tokens and an explicit state, for training, streaming and decoding alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.memory.diagnostics import MemoryDiagnostics
from phase2_jax.memory.state import MemoryState, init_memory_state
from phase2_jax.model.block import Block
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.embedding import look_up
from phase2_jax.physics import zeta

# Size of a position against a token of size 1: the sines already have a root mean square of 0.7.
ZETA_SCALE = 0.1
# Configuration, sequence length, implementation and random streams to a layer.
BlockFactory = Callable[[ModelConfig, int, str | None, nnx.Rngs], Any]
# One MemoryState for all layers: every leaf has a leading layer axis.
ModelState = MemoryState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """What a call shows of the model's inside.

    Attributes:
      layers: figures of every layer, arrays `(L,)`.
      gamma_LxBxNxP: Γ of every token and potential, or None unless the call asked for traces.
    """

    layers: MemoryDiagnostics
    gamma_LxBxNxP: jax.Array | None


def init_state(config: ModelConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> ModelState:
    """State of every layer before the first token of `batch` streams; every leaf has a leading axis of `num_layers`."""
    layer = init_memory_state(
        batch,
        config.num_heads,
        config.head_dim,
        config.value_width,
        config.num_potentials,
        config.conv_width - 1,
        dtype,
    )
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], config.num_layers, axis=0), layer)


class LanguageModel(nnx.Module):
    """Breath-of-Life language model (design 1.8)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        seq_len: int,
        rngs: nnx.Rngs,
        implementation: str | None = None,
        block: BlockFactory = Block,
    ):
        """Build and initialise.

        Args:
          config: architecture with `vocab_size` set.
          seq_len: tokens of a training sequence; the longest half-life at initialisation unless `half_life_max` says
            otherwise.
          rngs: `params` stream.
          implementation: of the scans, as in `pallas_kernels`; None = the fastest valid one.
          block: makes a layer; another than `Block` has to be called as `Block` is.

        Raises:
          UserError: a field of `config` is out of range.
        """
        config.validate()
        self.config = config
        dtype = jnp.dtype(config.dtype)
        unit = config.d_model**-0.5
        # Smaller tokens would drown in what the branches add to them; a tied table also has to give logits of order 1.
        init = nnx.initializers.normal(unit if config.tie_embeddings else 1.0)
        self.embedding = nnx.Embed(config.vocab_size, config.d_model, dtype=dtype, embedding_init=init, rngs=rngs)

        def make_block(key: jax.Array) -> Any:
            return block(config, seq_len, implementation, nnx.Rngs(params=key))

        # The layers' parameters are stacked, so that a program holds one layer however many there are.
        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), config.num_layers))
        # Feedback enters the potential of the layer above, which only a resolvent reads: the last layer has none.
        feeds_back = config.memory and config.memory_feedback and config.resolvent and config.num_layers > 1
        shape = (config.num_layers - 1, config.head_dim, config.value_width)
        # This makes ⟨P, W⟩ as large as the entries of W.
        feedback = nnx.initializers.normal((config.head_dim * config.value_width) ** -0.5)
        self.feedback = nnx.Param(feedback(rngs.params(), shape, jnp.float32)) if feeds_back else None
        self.norm = nnx.LayerNorm(config.d_model, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                kernel_init=nnx.initializers.normal(unit),
                rngs=rngs,
            )
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))
        self.output_dropout = nnx.Dropout(config.output_dropout)

    def embed(self, tokens_BxN: jax.Array, position: jax.Array) -> jax.Array:
        """What enters the first layer, `(B, N, D)`; `position` counts the tokens of the stream before these."""
        x_BxNxD = look_up(self.embedding.embedding[...], tokens_BxN, jnp.dtype(self.config.dtype))
        if self.config.position_embedding == "zeta":
            positions_N = position + jnp.arange(tokens_BxN.shape[1], dtype=jnp.int32)
            x_BxNxD = x_BxNxD + ZETA_SCALE * zeta.position_embedding(positions_N, self.config.d_model)[None].astype(
                x_BxNxD.dtype
            )
        return x_BxNxD

    def _drop(self, x_BxNxD: jax.Array, deterministic: bool, rngs: nnx.Rngs | None) -> jax.Array:
        """What is left of the embedding in training."""
        if self.config.token_dropout and not deterministic:
            # Never the first token of a row: what sees nothing but zeros stays zero in a layer without biases, and
            # every norm of a zero multiplies its gradient by 300.
            others = self.token_dropout(x_BxNxD[:, 1:], rngs=rngs)
            x_BxNxD = jnp.concatenate([x_BxNxD[:, :1], others], axis=1)
        return self.dropout(x_BxNxD, deterministic=deterministic, rngs=rngs)

    def __call__(
        self,
        tokens_BxN: jax.Array,
        state: ModelState,
        *,
        reset_BxN: jax.Array | None = None,
        aligned: bool = False,
        unroll: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        trace: bool = False,
        logits: bool = True,
    ) -> tuple[jax.Array, ModelState, Diagnostics]:
        """Predict the next token after each token.

        Args:
          tokens_BxN: integer token ids below `config.vocab_size`.
          state: from `init_state` or a previous call.
          reset_BxN: True where a document begins; its memory starts empty. None = nowhere.
          aligned: promise that the state's position is a multiple of `consolidation.interval` (faster; checked where
            the position is known), or that none lies within this call.
          unroll: compile every layer by itself instead of one for all: a longer program that copies neither parameters,
            which is what a single token's time consists of, nor what the backward pass keeps.
          deterministic: no dropout.
          rngs: `dropout` stream, needed unless deterministic.
          trace: also return Γ of every token.
          logits: False returns what the head reads instead, for a loss that works through the vocabulary in blocks.

        Returns:
          logits `(B, N, vocab)` float32 (without `logits` what the head reads, `(B, N, D)` in the compute dtype), the
            state after the last token, and diagnostics.

        Raises:
          ValueError: `aligned` was promised and is not so.
        """
        if reset_BxN is None:
            reset_BxN = jnp.zeros(tokens_BxN.shape, bool)
        _check_aligned(self.config, state.position, aligned)
        x_BxNxD = self._drop(self.embed(tokens_BxN, state.position[0]), deterministic, rngs)
        graphdef, params = nnx.split(self.blocks)

        def layer(carry, xs):
            x_BxNxD, feedback_BxN = carry
            layer_params, feedback_KxV, layer_state, key = xs
            block = nnx.merge(graphdef, layer_params)
            x_BxNxD, feedback_BxN, layer_state, figures, gamma_BxNxP = block(
                x_BxNxD,
                feedback_BxN,
                feedback_KxV,
                layer_state,
                reset_BxN,
                aligned=aligned,
                deterministic=deterministic,
                rngs=None if key is None else nnx.Rngs(dropout=key),
            )
            return (x_BxNxD, feedback_BxN), (layer_state, figures, gamma_BxNxP if trace else None)

        keys = None if deterministic or rngs is None else jax.random.split(rngs.dropout(), self.config.num_layers)
        start = (x_BxNxD, jnp.zeros(tokens_BxN.shape, jnp.float32))
        body = jax.checkpoint(layer) if self.config.remat else layer
        (x_BxNxD, _), (state, figures, gamma_LxBxNxP) = jax.lax.scan(
            body, start, (params, self.feedback_matrices(), state, keys), unroll=unroll
        )
        hidden_BxNxD = self.output_dropout(self.norm(x_BxNxD), deterministic=deterministic, rngs=rngs)
        diagnostics = Diagnostics(layers=figures, gamma_LxBxNxP=gamma_LxBxNxP)
        if not logits:
            return hidden_BxNxD, state, diagnostics
        logits_BxNxV = self.embedding.attend(hidden_BxNxD) if self.head is None else self.head(hidden_BxNxD)
        return logits_BxNxV.astype(jnp.float32), state, diagnostics

    def head_matrix(self) -> jax.Array:
        """What turns the last hidden vectors into logits, `(D, vocab)` float32."""
        return self.embedding.embedding[...].T if self.head is None else self.head.kernel[...]

    def feedback_matrices(self) -> jax.Array | None:
        """P of every layer `(L, K, V)`, of zeros in the last; None without feedback."""
        if self.feedback is None:
            return None
        return jnp.pad(self.feedback[...], ((0, 1), (0, 0), (0, 0)))


def _check_aligned(config: ModelConfig, position: jax.Array, aligned: bool) -> None:
    interval = config.consolidation.interval
    if aligned and interval and not isinstance(position, jax.core.Tracer) and int(np.asarray(position)[0]) % interval:
        raise ValueError(
            f"aligned=True but the stream stands at position {int(np.asarray(position)[0])}, no multiple of {interval}"
        )
