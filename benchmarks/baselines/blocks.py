"""Layers of other architectures, called as `phase2_jax.model.block.Block` is: everything around them is shared."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.errors import UserError
from phase2_jax.memory.diagnostics import MemoryDiagnostics
from phase2_jax.memory.state import MemoryState
from phase2_jax.model.block import FeedForward
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer

ROTARY_BASE = 10_000.0
# Gated linear attention: rank of the gate's projection, and the root that moves the gates towards 1.
GATE_RANK = 16
GATE_TEMPERATURE = 16.0


def rotate(x_BxNxHxK: jax.Array) -> jax.Array:
    """Rotary positions: pairs (i, i + K/2) turned by position / 10000^(2i/K) (Su et al., "RoFormer", 2021)."""
    half = x_BxNxHxK.shape[-1] // 2
    frequencies_K = ROTARY_BASE ** (-np.arange(half) / half)
    angles_NxK = np.arange(x_BxNxHxK.shape[1])[:, None] * frequencies_K
    cos, sin = (jnp.asarray(f(angles_NxK), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    first, second = jnp.split(x_BxNxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxNxHxK.dtype)


class Attention(nnx.Module):
    """Causal softmax attention with rotary positions inside a window and a document; nothing is carried over."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.num_heads * config.head_dim, jnp.dtype(config.dtype)
        init, out_init = projection_initializer(config), projection_initializer(config, config.num_layers**-0.5)
        self.qkv = nnx.Linear(config.d_model, 3 * width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, config.d_model, dtype=dtype, kernel_init=out_init, rngs=rngs)

    def __call__(self, x_BxNxD: jax.Array, state: MemoryState, reset_BxN: jax.Array) -> tuple[jax.Array, MemoryState]:
        heads = lambda a: a.reshape(*a.shape[:2], self.config.num_heads, -1)  # noqa: E731
        q, k, v = (heads(part) for part in jnp.split(self.qkv(x_BxNxD), 3, axis=-1))
        document_BxN = jnp.cumsum(reset_BxN, axis=1)
        same_Bx1xNxN = (document_BxN[:, :, None] == document_BxN[:, None])[:, None]
        y_BxNxHxK = jax.nn.dot_product_attention(rotate(q), rotate(k), v, mask=same_Bx1xNxN, is_causal=True)
        return self.out(y_BxNxHxK.reshape(*x_BxNxD.shape[:2], -1)), state


class GatedLinearAttention(nnx.Module):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t with α_t = sigmoid(low-rank)^(1/16) for every key channel,
    RMSNorm per head and a SiLU gate (Yang et al., "Gated Linear Attention Transformers", 2024). K is `head_dim`, V is
    `value_dim`; token by token.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, keys, values = config.d_model, config.num_heads * config.head_dim, config.num_heads * config.value_width
        init, out_init = projection_initializer(config), projection_initializer(config, config.num_layers**-0.5)
        dtype = jnp.dtype(config.dtype)
        linear = lambda inputs, outputs, bias=False: nnx.Linear(  # noqa: E731
            inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs
        )
        self.qkv = linear(d, 2 * keys + values)
        self.gate_down, self.gate_up = linear(d, GATE_RANK), linear(GATE_RANK, keys, bias=True)
        self.output_gate = linear(d, values, bias=True)
        self.norm = nnx.RMSNorm(config.value_width, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(values, d, use_bias=False, dtype=dtype, kernel_init=out_init, rngs=rngs)

    def __call__(self, x_BxNxD: jax.Array, state: MemoryState, reset_BxN: jax.Array) -> tuple[jax.Array, MemoryState]:
        config = self.config
        keys = config.num_heads * config.head_dim
        heads = lambda a: a.astype(jnp.float32).reshape(*a.shape[:2], config.num_heads, -1)  # noqa: E731
        q, k, v = (heads(part) for part in jnp.split(self.qkv(x_BxNxD), (keys, 2 * keys), axis=-1))
        gate_BxNxHxK = heads(self.gate_up(self.gate_down(x_BxNxD)))
        alpha_BxNxHxK = jnp.exp(jax.nn.log_sigmoid(gate_BxNxHxK) / GATE_TEMPERATURE)
        alpha_BxNxHxK = jnp.where(reset_BxN[..., None, None], 0, alpha_BxNxHxK)

        def step(s_BxHxKxV, token):
            q, k, v, alpha = token
            s_BxHxKxV = alpha[..., None] * s_BxHxKxV + k[..., None] * v[..., None, :]
            return s_BxHxKxV, jnp.einsum("bhk,bhkv->bhv", q, s_BxHxKxV)

        tokens_first = tuple(jnp.moveaxis(a, 1, 0) for a in (q * config.head_dim**-0.5, k, v, alpha_BxNxHxK))
        w_BxHxKxV, y = jax.lax.scan(step, state.w_BxHxKxV, tokens_first)
        y_BxNxE = self.norm(jnp.moveaxis(y, 0, 1)).reshape(*x_BxNxD.shape[:2], -1)
        y_BxNxE = y_BxNxE.astype(x_BxNxD.dtype) * jax.nn.silu(self.output_gate(x_BxNxD))
        return self.out(y_BxNxE), replace(state, w_BxHxKxV=w_BxHxKxV)


MIXERS = {"transformer": Attention, "gla": GatedLinearAttention}


class BaselineBlock(nnx.Module):
    """x ← x + Drop(mixer(LN x)); x ← x + Drop(FFN(LN x))."""

    def __init__(self, mixer: str, config: ModelConfig, rngs: nnx.Rngs):
        if config.resolvent:
            raise UserError("a baseline has no resolvent: give --config.model.resolvent=False")
        self.config = config
        norm = lambda: nnx.LayerNorm(config.d_model, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs)  # noqa: E731
        self.norm1, self.norm2 = norm(), norm()
        self.mixer = MIXERS[mixer](config, rngs)
        self.ffn = FeedForward(config, rngs) if config.ffn_width else None
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x_BxNxD, feedback_BxN, feedback_KxV, state: MemoryState, reset_BxN, *, aligned, deterministic, rngs
    ):
        """As `Block`; there is no Γ, and every figure of the memory is 0."""
        del feedback_KxV, aligned
        drop = lambda y: self.dropout(y, deterministic=deterministic, rngs=rngs)  # noqa: E731
        y_BxNxD, state = self.mixer(self.norm1(x_BxNxD), state, reset_BxN)
        x_BxNxD = x_BxNxD + drop(y_BxNxD)
        if self.ffn is not None:
            x_BxNxD = x_BxNxD + drop(self.ffn(self.norm2(x_BxNxD), deterministic=deterministic, rngs=rngs))
        state = replace(state, position=state.position + x_BxNxD.shape[1])
        figures = MemoryDiagnostics(**dict.fromkeys(MemoryDiagnostics.__dataclass_fields__, jnp.zeros(())))
        gamma_BxNxP = jnp.zeros((*x_BxNxD.shape[:2], self.config.num_potentials))
        return x_BxNxD, feedback_BxN, state, figures, gamma_BxNxP
