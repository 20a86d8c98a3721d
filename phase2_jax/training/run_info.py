"""What a run tells about itself before its first step."""

import warnings
from typing import Any

import jax

from phase2_jax.physics.potential import longest_half_life
from phase2_jax.training import workdir as workdirs
from phase2_jax.training.flops import flops_per_token
from phase2_jax.training.setup import Run
from phase2_jax.training.step import Params, TrainState


def warn_of_short_half_lives(run: Run) -> None:
    """Warn when base_decay caps the half-lives below the sequence length that they were meant to span."""
    model = run.model_config
    wanted = model.half_life_max or float(run.config.train.seq_len)
    longest = longest_half_life(model.base_decay, model.dt)
    if model.memory and model.adaptive_decay and longest < wanted:
        warnings.warn(
            f"model.base_decay={model.base_decay} shortens the longest half-life "
            f"from {wanted:.0f} to {longest:.0f} tokens; "
            f"at most {longest_half_life(1.0, model.dt) / wanted:.2g} would keep it",
            stacklevel=2,
        )


def parameter_table(params: Params) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number of entries of every parameter array; those of the layers are stacked."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        rows.append((".".join(name for name in names if name != "value"), leaf.shape, leaf.size))
    return rows


def count_epochs(run: Run, step: int, closed: int, num_open: int) -> int:
    """Epochs when the run is over; one that a shorter run closed before it was full counts.

    Args:
      run: with its present length.
      step: steps done.
      closed: epochs that were validated.
      num_open: steps since.
    """
    full_but_open = num_open > 0 and (step % run.steps_per_epoch == 0 or step >= run.total_steps)
    to_come = 0 if step >= run.total_steps else -(-run.total_steps // run.steps_per_epoch) - step // run.steps_per_epoch
    return closed + full_but_open + to_come


def run_info(run: Run, state: TrainState, start_step: int, num_epochs: int) -> dict[str, Any]:
    """For `Logger.on_start`: the list on screen, the whole configuration, and the lengths of the run."""
    config, model = run.config, run.model_config
    devices = run.mesh.devices
    return {
        "configuration": {
            "Model": f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads of {model.head_dim}",
            "Parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "FLOPs per token": f"{flops_per_token(model):.3g}",
            "Vocabulary": f"{model.vocab_size} ({run.corpus.tokenizer.name})",
            "Text": config.data.dataset or config.data.path or "the shipped text",
            "Training tokens": len(run.corpus.train),
            "Validation tokens": len(run.corpus.valid),
            "Batch": f"{config.train.batch_size} rows of {config.train.seq_len} tokens, {config.data.mode}",
            "Steps": f"{run.total_steps:,} ({run.steps_per_epoch:,} an epoch)",
            "Consolidation": f"every {model.consolidation.interval} tokens" if model.consolidation.interval else "off",
            "Learning rate": config.optimizer.learning_rate,
            "Devices": f"{devices.size} x {devices.flat[0].device_kind}",
        },
        "parameters": parameter_table(state.params),
        "hyperparameters": workdirs.plain(config),
        "start_step": start_step,
        "total_steps": run.total_steps,
        "num_epochs": num_epochs,
    }
