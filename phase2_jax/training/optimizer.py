"""AdamW or Muon with warmup and cosine decay, from optax."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from phase2_jax.model.config import ModelConfig
from phase2_jax.training.config import OptimizerConfig

DECAYED = ("kernel", "embedding", "feedback")
# Size of an update's entries relative to Adam's, so that both take the same learning rate (Liu et al., "Muon is
# scalable for LLM training", 2025).
MUON_RMS = 0.2


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warmup to `learning_rate`, cosine to `min_learning_rate` at `total_steps`; never 0 on the first step."""
    warmup = min(config.warmup_steps, total_steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
        end_value=config.min_learning_rate,
    )


def _names(path: tuple) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]


def decay_mask(params):
    """True for the matrices that weight decay acts on: projections, embedding, feedback; not norms, biases, taps,
    per-head scalars.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: any(name in DECAYED for name in _names(path)), params)


def muon_labels(params):
    """ "muon" for the matrices it orthogonalises, those of the layers' projections; "adamw" for all else."""

    def label(path: tuple, leaf) -> str:
        names = _names(path)
        return "muon" if "blocks" in names and "kernel" in names and leaf.ndim == 3 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _by_head(inner: optax.GradientTransformation, model: ModelConfig) -> optax.GradientTransformation:
    """`inner`, to which the projection onto queries, keys and values is a matrix for each of them and each head."""
    heads, keys, values = model.num_heads, model.head_dim, model.value_width

    def in_heads(path: tuple, kernel_LxDxC: jax.Array):
        if "qkv" not in _names(path):
            return kernel_LxDxC
        q_and_k, v = jnp.split(kernel_LxDxC, (2 * heads * keys,), axis=-1)
        layers_and_inputs = kernel_LxDxC.shape[:2]
        return q_and_k.reshape(*layers_and_inputs, 2 * heads, keys), v.reshape(*layers_and_inputs, heads, values)

    def whole(like_LxDxC: jax.Array, parts) -> jax.Array:
        if not isinstance(parts, tuple):
            return parts
        return jnp.concatenate([part.reshape(*like_LxDxC.shape[:2], -1) for part in parts], axis=-1)

    split = partial(jax.tree_util.tree_map_with_path, in_heads)

    def update(updates, state, params=None):
        parts, state = inner.update(split(updates), state, None if params is None else split(params))
        return jax.tree.map(whole, updates, parts), state

    return optax.GradientTransformation(lambda params: inner.init(split(params)), update)


def _muon(config: OptimizerConfig, schedule: optax.Schedule, model: ModelConfig) -> optax.GradientTransformation:
    matrices = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        # Axis 0 counts the layers, and axis 2 of those in four the heads.
        muon_weight_dimension_numbers=MuonDimensionNumbers(reduction_axis=1, output_axis=-1),
        consistent_rms=MUON_RMS,
    )
    if config.muon_by_head:
        matrices = _by_head(matrices, model)
    return optax.partition({"muon": matrices, "adamw": _adamw(config, schedule)}, muon_labels)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, model: ModelConfig
) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon on the schedule of the learning rate."""
    optimizer = _muon(config, schedule, model) if config.name == "muon" else _adamw(config, schedule)
    if config.gradient_clip_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), optimizer)
