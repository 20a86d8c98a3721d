"""Accuracy of a trained task model on sequences of other lengths, or with other numbers of things to remember.

    python benchmarks/task_accuracy.py --workdir=runs/mqar --cells=512:64,1024:64
    python benchmarks/task_accuracy.py --workdir=runs/induction --cells=256,1024,1048576 --examples=64

Prints the share of the scored tokens that were the model's likeliest, one line a cell (LENGTH or LENGTH:ITEMS); the
examples are the validation split's. Sequences longer than --window are read in windows with carried memory.
"""

import json
from functools import partial
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging

from phase2_jax.data.task_stream import EvalBatches, TaskStream
from phase2_jax.data.tasks import make_examples
from phase2_jax.inference.loading import load_model
from phase2_jax.model.language_model import init_state
from phase2_jax.training.step import eval_step

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
_CELLS = flags.DEFINE_list("cells", None, "LENGTH or LENGTH:ITEMS of each test set.", required=True)
_EXAMPLES = flags.DEFINE_integer("examples", 1000, "Sequences of a test set.")
_BATCH = flags.DEFINE_integer("batch_size", 50, "Sequences side by side.")
_WINDOW = flags.DEFINE_integer("window", 4096, "Tokens of a call.")


def main(argv: list[str]) -> None:
    del argv
    # Orbax reports every file it opens.
    absl_logging.set_verbosity(absl_logging.ERROR)
    loaded = load_model(Path(_WORKDIR.value), _CHECKPOINT.value)
    task, model = loaded.config.data.task, loaded.model_config
    step = jax.jit(partial(eval_step, loaded.graphdef(model), False))
    for cell in _CELLS.value:
        length, _, items = cell.partition(":")
        chance = TaskStream(task, "valid").chance(int(length), int(items or 0))
        examples = make_examples(task, chance, _EXAMPLES.value, int(length), int(items or 0))
        batches = EvalBatches(examples, _BATCH.value, min(_WINDOW.value, int(length)))
        memory, right, count = init_state(model, _BATCH.value), 0.0, 0.0
        for batch in batches:
            sums, memory, _ = step(loaded.params, memory, batch)
            right, count = right + sums["right"], count + sums["count"]
        print(json.dumps({"cell": cell, "accuracy": float(right / count), "scored": int(count)}), flush=True)


if __name__ == "__main__":
    app.run(main)
