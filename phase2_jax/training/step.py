"""One jitted training step and one jitted evaluation step: pure functions of an explicit `TrainState`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.model.language_model import Diagnostics, LanguageModel, ModelState
from phase2_jax.training.loss import head_loss, num_right, token_loss

Params = Any
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
      params: the model's parameters, float32.
      opt_state: of the optax optimizer.
      memory: state of every layer, one row for each row of the batch.
      rng: key from which each step folds its own.
      step: steps done, int32.
      failed_step: the first step (from 1) whose loss or gradient was not finite, 0 while there is none. From then on
        nothing changes any more: the state stays the last good one.
    """

    params: Params
    opt_state: Any
    memory: ModelState
    rng: jax.Array
    step: jax.Array
    failed_step: jax.Array


@dataclass(frozen=True)
class StepConfig:
    """What a step needs to know besides the arrays.

    Attributes:
      graphdef: structure of the model.
      optimizer: of optax.
      schedule: learning rate of each step, for the record.
      grad_accum: micro-batches a step is split into.
      fresh_memory: makes the memory every step starts from; None = it carries over from step to step.
      aligned: the stream position is a multiple of the consolidation interval at every step.
      unroll: every layer is compiled by itself.
    """

    graphdef: nnx.GraphDef[LanguageModel]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    grad_accum: int
    fresh_memory: Callable[[], ModelState] | None
    aligned: bool
    unroll: bool = False


def split_rows(tree: Any, parts: int, axis: int) -> Any:
    """Cut the rows at `axis` into `parts` at a new leading axis; interleaved, so that every device keeps a share of
    every part.

    Leaves without that axis (stream positions) are repeated.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.ndim <= axis:
            return jnp.broadcast_to(x, (parts, *x.shape))
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    return jax.tree.map(split, tree)


def join_rows(tree: Any, axis: int) -> Any:
    """Inverse of `split_rows`."""

    def join(x: jax.Array) -> jax.Array:
        if x.ndim <= axis + 1:
            return x[0]
        x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])

    return jax.tree.map(join, tree)


def loss_and_gradient(
    config: StepConfig, params: Params, memory: ModelState, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Params, ModelState, Diagnostics]:
    """Mean loss over the batch's scored tokens, its gradient, the new memory and the figures, in `grad_accum`
    micro-batches.

    Every micro-batch is divided by the token count of the whole batch, so the result does not depend on how it is
    split.
    """
    total = jnp.maximum(jnp.sum(batch["labels"] != NOT_SCORED), 1).astype(jnp.float32)

    def micro_loss(params: Params, memory: ModelState, micro: Batch, rng: jax.Array):
        model = nnx.merge(config.graphdef, params)
        hidden, memory, diagnostics = model(
            micro["tokens"],
            memory,
            reset_BxN=micro["reset"],
            aligned=config.aligned,
            unroll=config.unroll,
            deterministic=False,
            rngs=nnx.Rngs(dropout=rng),
            logits=False,
        )
        return head_loss(hidden, model.head_matrix(), micro["labels"]) / total, (memory, diagnostics)

    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    if config.grad_accum == 1:
        (loss, (memory, diagnostics)), grads = gradient(params, memory, batch, rng)
        return loss, grads, memory, diagnostics

    def accumulate(carry, xs):
        loss, grads = carry
        micro_memory, micro, index = xs
        (micro_loss, (micro_memory, diagnostics)), micro_grads = gradient(
            params, micro_memory, micro, jax.random.fold_in(rng, index)
        )
        return (loss + micro_loss, jax.tree.map(jnp.add, grads, micro_grads)), (micro_memory, diagnostics)

    parts = config.grad_accum
    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), (memories, diagnostics) = jax.lax.scan(
        accumulate, start, (split_rows(memory, parts, axis=1), split_rows(batch, parts, axis=0), jnp.arange(parts))
    )
    return loss, grads, join_rows(memories, axis=1), _combine_figures(diagnostics)


def _combine_figures(diagnostics: Diagnostics) -> Diagnostics:
    """Figures of stacked micro-batches as those of the whole batch: means, extrema and a pooled standard deviation."""
    layers = diagnostics.layers
    mean = jax.tree.map(partial(jnp.mean, axis=0), layers)
    second = jnp.mean(jnp.square(layers.gamma_std) + jnp.square(layers.gamma_mean), axis=0)
    mean = replace(
        mean,
        gamma_std=jnp.sqrt(jnp.maximum(second - jnp.square(mean.gamma_mean), 0)),
        gamma_min=jnp.min(layers.gamma_min, axis=0),
        gamma_max=jnp.max(layers.gamma_max, axis=0),
    )
    return replace(diagnostics, layers=mean)


def train_step(config: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step.

    Args:
      config: static.
      state: donated by the caller's jit.
      batch: tokens, labels and reset, `(B, N)` each.

    Returns:
      the next state, and metrics: loss, grad_norm, learning_rate, failed_step (scalars) and layers
        (`MemoryDiagnostics` of `(L,)`).
    """
    memory = state.memory if config.fresh_memory is None else config.fresh_memory()
    rng = jax.random.fold_in(state.rng, state.step)
    loss, grads, memory, diagnostics = loss_and_gradient(config, state.params, memory, batch, rng)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite & (state.failed_step == 0)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    failed_step = jnp.where((state.failed_step == 0) & ~finite, state.step + 1, state.failed_step)
    next_state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        memory=keep(memory, state.memory),
        rng=state.rng,
        step=jnp.where(good, state.step + 1, state.step),
        failed_step=failed_step,
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": config.schedule(state.step),
        "failed_step": failed_step,
        "layers": diagnostics.layers,
    }
    return next_state, metrics


def eval_step(
    graphdef: nnx.GraphDef[LanguageModel], aligned: bool, params: Params, memory: ModelState, batch: Batch
) -> tuple[dict[str, jax.Array], ModelState, jax.Array]:
    """Sums over the scored tokens (loss in nats, right: the likeliest was the label, count), new memory, and Γ
    `(L, B, N, P)`; no dropout.
    """
    model = nnx.merge(graphdef, params)
    logits, memory, diagnostics = model(batch["tokens"], memory, reset_BxN=batch["reset"], aligned=aligned, trace=True)
    loss, count = token_loss(logits, batch["labels"])
    assert diagnostics.gamma_LxBxNxP is not None
    sums = {"loss": loss, "right": num_right(logits, batch["labels"]), "count": count}
    return sums, memory, diagnostics.gamma_LxBxNxP


def compile_train_step(
    config: StepConfig, shardings: TrainState | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """`train_step` jitted, its state donated; `shardings` keep the state where it is on several devices."""
    out = None if shardings is None else (shardings, None)
    return jax.jit(partial(train_step, config), donate_argnums=0, out_shardings=out)
