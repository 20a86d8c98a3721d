"""Accuracy of a trained task model on sequences of other lengths, or with other numbers of things to remember.

    python benchmarks/task_accuracy.py --workdir=runs/mqar --cells=512:64,1024:64
    python benchmarks/task_accuracy.py --workdir=runs/induction --cells=256,1024,1048576 --examples=64

Prints the share of the scored tokens that were the model's likeliest, one line a cell (LENGTH or LENGTH:ITEMS); the
examples are the validation split's. Sequences longer than --window are read in windows with carried memory.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from phase2_jax.data.config import TaskConfig
from phase2_jax.data.task_stream import EvalBatches, TaskStream
from phase2_jax.data.tasks import least_length, make_examples
from phase2_jax.errors import UserError
from phase2_jax.inference.loading import load_model
from phase2_jax.interrupt import interruptible
from phase2_jax.model.language_model import init_state
from phase2_jax.programs import command_line
from phase2_jax.training.step import eval_step

USAGE = "python benchmarks/task_accuracy.py --workdir=runs/x --cells=LENGTH[:ITEMS],… [--checkpoint=best|latest|STEP]"


def _flags() -> flags.FlagValues:
    values = command_line.model_flags()
    flags.DEFINE_list("cells", [], "LENGTH or LENGTH:ITEMS of each test set.", flag_values=values)
    flags.DEFINE_integer("examples", 1000, "Sequences of a test set.", flag_values=values)
    flags.DEFINE_integer("batch_size", 50, "Sequences side by side.", flag_values=values)
    flags.DEFINE_integer("window", 4096, "Tokens of a call.", flag_values=values)
    return values


def _cell(text: str, task: TaskConfig) -> tuple[int, int]:
    """Length and number of items of a cell; 0 items are those of training.

    Raises:
      UserError: it is no cell, or has no room for the task.
    """
    length, colon, items = text.partition(":")
    if not length.isdecimal() or (colon and not (items.isdecimal() and int(items))):
        raise UserError(f"--cells={text} is no test set: write LENGTH or LENGTH:ITEMS, for example 512:64")
    wanted = int(items or task.num_items)
    try:
        replace(task, num_items=wanted, mixture="").validate()
    except UserError as error:
        raise UserError(f"--cells={text}: {error}: lower ITEMS") from error
    if int(length) < (least := least_length(task, wanted)):
        raise UserError(f"--cells={text} is too short for {task.name} with {wanted} items: it needs LENGTH {least}")
    return int(length), int(items or 0)


def _run(chosen: dict[str, Any]) -> None:
    # Orbax reports every file it opens.
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("examples", "batch_size", "window"):
        if chosen[name] < 1:
            raise UserError(f"--{name}={chosen[name]} must be at least 1")
    if not chosen["cells"]:
        raise UserError("--cells is missing: give LENGTH or LENGTH:ITEMS, for example --cells=512:64")
    loaded = load_model(Path(chosen["workdir"]), chosen["checkpoint"])
    task, model = loaded.config.data.task, loaded.model_config
    if not task.name:
        raise UserError(f"--workdir={chosen['workdir']} was trained on a text, not on a task: use evaluate.py")
    cells = {cell: _cell(cell, task) for cell in chosen["cells"]}
    step = jax.jit(partial(eval_step, loaded.graphdef(model), False))
    for cell, (length, items) in cells.items():
        chance = TaskStream(task, "valid").chance(length, items)
        examples = make_examples(task, chance, chosen["examples"], length, items)
        batches = EvalBatches(examples, chosen["batch_size"], min(chosen["window"], length))
        memory, right, count = init_state(model, chosen["batch_size"]), 0.0, 0.0
        for batch in batches:
            sums, memory, _ = step(loaded.params, memory, batch)
            right, count = right + sums["right"], count + sums["count"]
        print(json.dumps({"cell": cell, "accuracy": float(right / count), "scored": int(count)}), flush=True)


def main() -> None:
    """Parse the command line and measure; see `command_line.run` for exit statuses."""
    command_line.run(_flags(), USAGE, _run, "lower --batch_size or --window, or set JAX_PLATFORMS=cpu")


if __name__ == "__main__":
    with interruptible():
        main()
