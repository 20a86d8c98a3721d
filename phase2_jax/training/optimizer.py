"""AdamW with warmup and cosine decay, from optax."""

import jax
import optax

from phase2_jax.training.config import OptimizerConfig

DECAYED = ("kernel", "embedding", "feedback")


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


def _is_decayed(path: tuple, _) -> bool:
    names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    return any(name in DECAYED for name in names)


def decay_mask(params):
    """True for the matrices that weight decay acts on: projections, embedding, feedback; not norms, biases, taps,
    per-head scalars.
    """
    return jax.tree_util.tree_map_with_path(_is_decayed, params)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW on the schedule of the learning rate."""
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.gradient_clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), adamw)
