"""Hebbian branch: projections and gates around the dissipative memory."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from phase2_jax.memory.convolution import causal_convolution
from phase2_jax.memory.hebbian import Writes
from phase2_jax.memory.state import MemoryState
from phase2_jax.memory.stream import scan_stream
from phase2_jax.model.barrier import stored_gradient
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer
from phase2_jax.recompute import recomputed

NORM_EPSILON = 1e-6


def _random_taps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform with the variance 1 / (3·width). Taps that start as the identity have to discover the tokens before
    first, and learn several times slower what depends on them.
    """
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class MemoryBranch(nnx.Module):
    """q, k, v → short convolution + SiLU → normalised keys → scan → RMSNorm per head → SiLU gate → Dense, each step
    switchable.
    """

    def __init__(self, config: ModelConfig, implementation: str | None, rngs: nnx.Rngs):
        self.config = config
        self.implementation = implementation
        h, k, v, d = config.num_heads, config.head_dim, config.value_width, config.d_model
        dtype = jnp.dtype(config.dtype)
        linear = lambda n, scale=1.0: nnx.Linear(  # noqa: E731
            d, n, use_bias=False, dtype=dtype, kernel_init=projection_initializer(config, scale), rngs=rngs
        )
        self.qkv = linear(h * (2 * k + v))
        taps = (config.conv_width, h * (2 * k + v))
        self.taps = nnx.Param(_random_taps(rngs.params(), taps)) if config.conv_width > 1 else None
        self.write_gate = (
            nnx.Linear(d, h, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs) if config.eta_gate else None
        )
        self.readout_scale = nnx.Param(jnp.ones((h, v), jnp.float32)) if config.readout_norm else None
        floor = config.readout_floor
        self.readout_log_floor = nnx.Param(jnp.full((h, 1), math.log(floor), jnp.float32)) if floor else None
        self.output_gate = linear(h * v) if config.output_gate else None
        self.out = nnx.Linear(
            h * v, d, dtype=dtype, kernel_init=projection_initializer(config, config.num_layers**-0.5), rngs=rngs
        )

    def _projections(self, x_BxNxD: jax.Array, state: MemoryState, reset_BxN: jax.Array):
        config = self.config
        qkv_BxNxC = self.qkv(x_BxNxD)
        if self.taps is not None:
            qkv_BxNxC, tail = causal_convolution(qkv_BxNxC, self.taps[...], state.conv_tail_BxTxC, reset_BxN)
            state = replace(state, conv_tail_BxTxC=tail)
        width = config.num_heads * config.head_dim
        q, k, v = jnp.split(qkv_BxNxC, (width, 2 * width), axis=-1)
        in_heads = lambda a: a.reshape(*a.shape[:2], config.num_heads, -1)  # noqa: E731
        q_BxNxHxK, k_BxNxHxK, v_BxNxHxV = in_heads(q), in_heads(k), in_heads(v)
        if config.key_power:
            q_BxNxHxK, k_BxNxHxK = (jax.nn.relu(x) ** config.key_power for x in (q_BxNxHxK, k_BxNxHxK))
        if config.key_norm:
            q_BxNxHxK, k_BxNxHxK = _unit(q_BxNxHxK), _unit(k_BxNxHxK)
        else:
            k_BxNxHxK = k_BxNxHxK * config.head_dim**-0.5
        return q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, state

    def writes(
        self, x_BxNxD: jax.Array, gamma_BxNxP: jax.Array, state: MemoryState, reset_BxN: jax.Array
    ) -> tuple[Writes, MemoryState]:
        """What the tokens ask of the memory, and the state with the convolution's new tail."""
        q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, state = self._projections(x_BxNxD, state, reset_BxN)
        shape_BxNxH = q_BxNxHxK.shape[:3]
        eta_BxNxH = jnp.full(shape_BxNxH, self.config.eta, jnp.float32)
        if self.write_gate is not None:
            eta_BxNxH = eta_BxNxH * jax.nn.sigmoid(self.write_gate(x_BxNxD.astype(jnp.float32)))
        log_decay_BxNxH = jnp.broadcast_to(-gamma_BxNxP * self.config.dt, shape_BxNxH)
        return Writes(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN), state

    def __call__(
        self,
        x_BxNxD: jax.Array,
        gamma_BxNxP: jax.Array,
        feedback_KxV: jax.Array | None,
        state: MemoryState,
        reset_BxN: jax.Array,
        *,
        aligned: bool,
    ) -> tuple[jax.Array, jax.Array, MemoryState]:
        """Branch output `(B, N, D)`, feedback f `(B, N)` float32 for the next layer's potential, and the new state."""
        config = self.config
        writes, state = self.writes(x_BxNxD, gamma_BxNxP, state, reset_BxN)
        y_BxNxHxV, f_BxN, state = scan_stream(
            writes, state, feedback_KxV, config.memory_config, aligned=aligned, implementation=self.implementation
        )
        if self.readout_scale is not None:
            log_floor = self.readout_log_floor
            floor_Hx1 = 0.0 if log_floor is None else jnp.exp(log_floor[...])
            y_BxNxHxV = _rms_norm(y_BxNxHxV, self.readout_scale[...], floor_Hx1)
        y_BxNxE = y_BxNxHxV.reshape(*x_BxNxD.shape[:2], -1)
        if self.output_gate is not None:
            y_BxNxE = _gated(y_BxNxE, stored_gradient(self.output_gate(x_BxNxD)))
        return self.out(y_BxNxE), f_BxN, state


@recomputed
def _unit(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


@recomputed
def _rms_norm(x: jax.Array, scale: jax.Array, floor: jax.Array | float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    squares = jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + (jnp.square(floor) + NORM_EPSILON)
    unit = (x32 * jax.lax.rsqrt(squares)).astype(x.dtype)
    return unit * scale.astype(x.dtype)


@recomputed
def _gated(y: jax.Array, gate: jax.Array) -> jax.Array:
    return y * jax.nn.silu(gate)
