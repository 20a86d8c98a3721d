"""Layers of other architectures, called as `phase2_jax.model.block.Block` is: everything around them is shared."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.chunking import pad_tokens, walk
from pallas_kernels.registry import compute_capability, default_device
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
# Tokens whose keys are divided by their decays since the chunk began: with this floor of the log decays e^80 at most.
GATED_CHUNK, LOG_GATE_FLOOR = 16, -5.0


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
    """Causal softmax attention with rotary positions inside a window, also across the documents in it; nothing is
    carried over. In bfloat16 on a GPU it is cuDNN's fused kernel.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.num_heads * config.head_dim, jnp.dtype(config.dtype)
        init, out_init = projection_initializer(config), projection_initializer(config, config.num_layers**-0.5)
        self.qkv = nnx.Linear(config.d_model, 3 * width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, config.d_model, dtype=dtype, kernel_init=out_init, rngs=rngs)

    def __call__(self, x_BxNxD: jax.Array, state: MemoryState, reset_BxN: jax.Array) -> tuple[jax.Array, MemoryState]:
        heads = lambda a: a.reshape(*a.shape[:2], self.config.num_heads, -1)  # noqa: E731
        q, k, v = (heads(part) for part in jnp.split(self.qkv(x_BxNxD), 3, axis=-1))
        del reset_BxN
        widest = 128  # of what cuDNN's kernel takes
        fused = compute_capability(default_device()) >= 8 and q.dtype == jnp.bfloat16 and q.shape[-1] <= widest
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn" if fused else "xla")
        y_BxNxHxK = attend(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y_BxNxHxK.reshape(*x_BxNxD.shape[:2], -1)), state


def gated_scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_gate_BxNxHxK: jax.Array,
    state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(exp log_gate_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t in chunks: y (B, N, H, V) and the last state.

    All float32, products at jax's default precision.
    """
    num_tokens = q_BxNxHxK.shape[1]

    def chunks(x):
        padded = pad_tokens(x, GATED_CHUNK)
        return padded.reshape(x.shape[0], -1, GATED_CHUNK, *x.shape[2:])

    # A reset is no decay here: what it separates is masked.
    log_gate = jnp.where(reset_BxN[..., None, None], 0, jnp.maximum(log_gate_BxNxHxK, LOG_GATE_FLOOR))
    q, k, v, log_gate, reset = (chunks(x) for x in (q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_gate, reset_BxN))
    sums, document_BxMxC = jnp.cumsum(log_gate, axis=2), jnp.cumsum(reset, axis=2)
    same = document_BxMxC[..., :, None] == document_BxMxC[..., None, :]
    q, last = q * jnp.exp(sums), sums[:, :, -1:]
    scores = jnp.einsum("bmihk,bmjhk->bmhij", q, k * jnp.exp(-sums))
    scores = jnp.where((same & jnp.tril(jnp.ones_like(same[0, 0])))[:, :, None], scores, 0)
    of_entry, of_exit = document_BxMxC == 0, document_BxMxC == document_BxMxC[..., -1:]
    leaving = jnp.where(of_exit[..., None, None], k * jnp.exp(last - sums), 0)
    written = jnp.einsum("bmjhk,bmjhv->bmhkv", leaving, v)
    whole_BxMxHxK = jnp.where(of_entry[:, :, -1, None, None], jnp.exp(last[:, :, 0]), 0)

    def step(state, chunk):
        whole, written = chunk
        return whole[..., None] * state + written, state

    chunks_first = (jnp.moveaxis(x, 1, 0) for x in (whole_BxMxHxK, written))
    state, entries = walk(step, state_BxHxKxV, tuple(chunks_first))
    y = jnp.einsum("bmhij,bmjhv->bmihv", scores, v)
    y += jnp.einsum("bmihk,mbhkv->bmihv", jnp.where(of_entry[..., None, None], q, 0), entries)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :num_tokens], state


class GatedLinearAttention(nnx.Module):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t with α_t = sigmoid(low-rank)^(1/16) for every key channel,
    RMSNorm per head and a SiLU gate (Yang et al., "Gated Linear Attention Transformers", 2024). K is `head_dim`, V is
    `value_dim`.
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
        log_gate = jax.nn.log_sigmoid(gate_BxNxHxK) / GATE_TEMPERATURE
        y_BxNxHxV, w_BxHxKxV = gated_scan(q * config.head_dim**-0.5, k, v, log_gate, state.w_BxHxKxV, reset_BxN)
        y_BxNxE = self.norm(y_BxNxHxV).reshape(*x_BxNxD.shape[:2], -1)
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
