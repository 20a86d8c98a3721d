"""The wiring of the layers against the original's: every branch but the resolvent computed here, from its weights."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.memory.state import MemoryState, init_memory_state
from phase2_jax.model.block import Block, FeedForward
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.model.memory_branch import MemoryBranch

# Float32 in another order of summation, through two layers; logits are of size 1.
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4)

CONFIG = ModelConfig(
    vocab_size=101,
    d_model=32,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    base_decay=1e-3,
    shared_potential=True,
    eta=0.1 * 16**0.5,  # unnormalised keys are divided by √16 here
    conv_width=1,
    key_norm=False,
    eta_gate=False,
    readout_norm=False,
    output_gate=False,
    memory_feedback=False,
    consolidation=ConsolidationConfig(interval=0),
)


class GivenResolvent:
    """Stands for the resolvent branch: the original's G is wrong by its own formula, so its features are given."""

    def __init__(self, features_BxNx2: np.ndarray, weight_Dx2: np.ndarray, bias_D: np.ndarray):
        self.output_BxNxD = jnp.asarray(features_BxNx2 @ weight_Dx2.T + bias_D)
        self.seen: dict[str, jax.Array] = {}

    def __call__(self, v_BxNxP: jax.Array, gamma_BxNxP: jax.Array, state: MemoryState, reset_BxN: jax.Array):
        del reset_BxN
        self.seen = {"v": v_BxNxP[..., 0], "gamma": gamma_BxNxP[..., 0]}
        return self.output_BxNxD, state


def assign(module: nnx.Module, name: str, value: np.ndarray) -> None:
    parameter = getattr(module, name)
    assert parameter.shape == value.shape, f"{name}: {parameter.shape} here, {value.shape} there"
    parameter[...] = jnp.asarray(value)


def fill(linear: nnx.Linear | None, weights: dict[str, np.ndarray], name: str) -> None:
    assert linear is not None
    assign(linear, "kernel", weights[f"{name}.weight"].T)
    if linear.bias is not None:
        assign(linear, "bias", weights.get(f"{name}.bias", np.zeros(linear.bias.shape, np.float32)))


def fill_norm(norm: nnx.LayerNorm | None, weights: dict[str, np.ndarray], name: str) -> None:
    assert norm is not None
    assign(norm, "scale", weights[f"{name}.weight"])
    assign(norm, "bias", weights[f"{name}.bias"])


def original_block(weights: dict[str, np.ndarray], layer: int) -> Block:
    block = Block(CONFIG, 32, None, nnx.Rngs(0))
    assert isinstance(block.memory, MemoryBranch)
    assert isinstance(block.ffn, FeedForward)
    prefix = f"blocks.{layer}"
    for n, norm in enumerate((block.norm1, block.norm2, block.norm3), start=1):
        fill_norm(norm, weights, f"{prefix}.ln{n}")
    fill(block.potential.real, weights, f"{prefix}.dissipative_bk.potential.v_proj")
    fill(block.potential.rate, weights, f"{prefix}.dissipative_bk.potential.gamma_proj")
    # It read W q where we read Wᵀ q: its values are our keys and its keys our values.
    q_k_v = [weights[f"{prefix}.hebbian.{name}_proj.weight"] for name in ("q", "v", "k")]
    assign(block.memory.qkv, "kernel", np.concatenate(q_k_v).T)
    fill(block.memory.out, weights, f"{prefix}.hebbian.out_proj")
    fill(block.ffn.up, weights, f"{prefix}.ffn.0")
    fill(block.ffn.down, weights, f"{prefix}.ffn.3")
    return block


@pytest.mark.parametrize("chunk", ["eval1", "eval2"])
def test_blocks_and_head(weights, activations, chunk):
    """Norms, residuals, potential, memory, feed-forward, head and carried memory, given embeddings and resolvents."""
    x_BxNxD = jnp.asarray(activations[f"{chunk}/input_embeddings"])
    nothing_BxN = jnp.zeros(x_BxNxD.shape[:2])
    for layer in range(CONFIG.num_layers):
        recorded = {name: activations.get(f"{chunk}/layer{layer}/{name}") for name in ("v", "gamma", "output", "W_raw")}
        block = original_block(weights, layer)
        projection = f"blocks.{layer}.bk_proj"
        resolvent = GivenResolvent(
            activations[f"{chunk}/layer{layer}/bk_features"],
            weights[f"{projection}.weight"],
            weights[f"{projection}.bias"],
        )
        setattr(block, "resolvent", resolvent)  # noqa: B010 - of another type than the branch it stands for
        state = init_memory_state(2, CONFIG.num_heads, CONFIG.head_dim, CONFIG.value_width, 1, 0)
        if chunk == "eval2":
            carried_BxHxKxV = activations[f"eval1/layer{layer}/W_final"].swapaxes(-1, -2)
            state = replace(state, w_BxHxKxV=jnp.asarray(carried_BxHxKxV))

        @jax.jit
        def run(x_BxNxD: jax.Array, state: MemoryState, block: Block = block, resolvent: GivenResolvent = resolvent):
            feedback_KxV = jnp.zeros((CONFIG.head_dim, CONFIG.value_width))
            reset_BxN = nothing_BxN.astype(bool)
            x_BxNxD, _, state, *_ = block(
                x_BxNxD, nothing_BxN, feedback_KxV, state, reset_BxN, aligned=False, deterministic=True, rngs=None
            )
            return x_BxNxD, state.w_BxHxKxV, resolvent.seen

        x_BxNxD, w_BxHxKxV, seen = run(x_BxNxD, state)
        close(x_BxNxD, recorded["output"])
        close(w_BxHxKxV.swapaxes(-1, -2), recorded["W_raw"])
        close(seen["gamma"], recorded["gamma"])
        if recorded["v"] is not None:
            close(seen["v"], recorded["v"])

    model = LanguageModel(CONFIG, seq_len=32, rngs=nnx.Rngs(0))
    fill_norm(model.norm, weights, "ln_f")
    fill(model.head, weights, "lm_head")
    assert model.head is not None
    logits_BxNxV = model.head(model.norm(x_BxNxD))
    close(logits_BxNxV, activations[f"{chunk}/logits"])
