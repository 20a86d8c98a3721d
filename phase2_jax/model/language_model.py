"""The language model: one pure function of tokens and an explicit state, for training, streaming and decoding alike."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.memory.diagnostics import MemoryDiagnostics
from phase2_jax.memory.state import MemoryState, init_memory_state
from phase2_jax.model.block import Block
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer
from phase2_jax.physics import zeta

ModelState = list[MemoryState]
EMBEDDING_STDDEV = 0.02


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
    """State of every layer before the first token of `batch` streams."""
    return [
        init_memory_state(
            batch, config.num_heads, config.head_dim, config.value_width, config.num_potentials, config.conv_width - 1, dtype
        )
        for _ in range(config.num_layers)
    ]


class LanguageModel(nnx.Module):
    """Breath-of-Life language model (design 1.8)."""

    def __init__(self, config: ModelConfig, *, seq_len: int, rngs: nnx.Rngs, implementation: str | None = None):
        """Build and initialise.

        Args:
          config: architecture with `vocab_size` set.
          seq_len: tokens of a training sequence; the longest half-life at initialisation unless `half_life_max` says otherwise.
          rngs: `params` stream.
          implementation: of the scans, as in `pallas_kernels`; None = the fastest valid one.

        Raises:
          UserError: a field of `config` is out of range.
        """
        config.validate()
        self.config = config
        dtype = jnp.dtype(config.dtype)
        init = nnx.initializers.normal(EMBEDDING_STDDEV)
        self.embedding = nnx.Embed(config.vocab_size, config.d_model, dtype=dtype, embedding_init=init, rngs=rngs)
        last = config.num_layers - 1
        self.blocks = nnx.List([Block(config, seq_len, i == last, implementation, rngs) for i in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.d_model, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(config.d_model, config.vocab_size, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        )
        self.dropout = nnx.Dropout(config.dropout)

    def _embed(self, tokens_BxN: jax.Array, position: jax.Array) -> jax.Array:
        x_BxNxD = self.embedding(tokens_BxN)
        if self.config.position_embedding == "zeta":
            positions_N = position + jnp.arange(tokens_BxN.shape[1], dtype=jnp.int32)
            x_BxNxD = x_BxNxD + EMBEDDING_STDDEV * zeta.position_embedding(positions_N, self.config.d_model)[None].astype(x_BxNxD.dtype)
        return x_BxNxD

    def __call__(
        self,
        tokens_BxN: jax.Array,
        state: ModelState,
        *,
        reset_BxN: jax.Array | None = None,
        aligned: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        trace: bool = False,
    ) -> tuple[jax.Array, ModelState, Diagnostics]:
        """Predict the next token after each token.

        Args:
          tokens_BxN: integer token ids below `config.vocab_size`.
          state: from `init_state` or a previous call.
          reset_BxN: True where a document begins; its memory starts empty. None = nowhere.
          aligned: promise that the state's position is a multiple of `consolidation.interval` (faster; checked where the position is known).
          deterministic: no dropout.
          rngs: `dropout` stream, needed unless deterministic.
          trace: also return Γ of every token.

        Returns:
          logits `(B, N, vocab)` float32, the state after the last token, and diagnostics.

        Raises:
          ValueError: `aligned` was promised and is not so.
        """
        if reset_BxN is None:
            reset_BxN = jnp.zeros(tokens_BxN.shape, bool)
        _check_aligned(self.config, state[0].position, aligned)
        x_BxNxD = self.dropout(self._embed(tokens_BxN, state[0].position), deterministic=deterministic, rngs=rngs)
        feedback_BxN = jnp.zeros(tokens_BxN.shape, jnp.float32)

        def run(block: Block, x, feedback, layer_state, rngs):
            return block(x, feedback, layer_state, reset_BxN, aligned=aligned, deterministic=deterministic, rngs=rngs)

        run_block = nnx.remat(run) if self.config.remat else run
        new_state, figures, gammas = [], [], []
        for block, layer_state in zip(self.blocks, state, strict=True):
            x_BxNxD, feedback_BxN, layer_state, layer_figures, gamma_BxNxP = run_block(block, x_BxNxD, feedback_BxN, layer_state, rngs)
            new_state.append(layer_state)
            figures.append(layer_figures)
            gammas.append(gamma_BxNxP)
        hidden_BxNxD = self.norm(x_BxNxD)
        logits_BxNxV = self.embedding.attend(hidden_BxNxD) if self.head is None else self.head(hidden_BxNxD)
        diagnostics = Diagnostics(
            layers=jax.tree.map(lambda *a: jnp.stack(a), *figures), gamma_LxBxNxP=jnp.stack(gammas) if trace else None
        )
        return logits_BxNxV.astype(jnp.float32), new_state, diagnostics


def _check_aligned(config: ModelConfig, position: jax.Array, aligned: bool) -> None:
    interval = config.consolidation.interval
    if aligned and interval and not isinstance(position, jax.core.Tracer) and int(np.asarray(position)) % interval:
        raise ValueError(f"aligned=True but the stream stands at position {int(position)}, no multiple of {interval}")
