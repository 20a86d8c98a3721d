"""Two devices share the rows of a batch and compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
SETTINGS = (
    "model.d_model=8",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.head_dim=4",
    "model.ffn_dim=8",
    "model.consolidation.interval=8",
    "train.seq_len=16",
    "train.batch_size=8",
    "train.grad_accum=2",
    "train.num_steps=6",
    "train.steps_per_epoch=3",
    "train.num_val_batches=2",
    "checkpoint.every_steps=2",
    "logging.tensorboard=False",
)


def train(workdir: Path, devices: int, *settings: str) -> list[dict]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{setting}" for setting in (*SETTINGS, *settings)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{devices} x cpu" in result.stdout
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_devices_compute_what_one_computes(tmp_path):
    one = train(tmp_path / "one", 1)
    two = train(tmp_path / "two", 2)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        # The same sums in another order, six optimizer steps long.
        key = "loss" if a["kind"] == "step" else "train_loss"
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4)
        np.testing.assert_allclose(a["mean_fast_weight_energy"], b["mean_fast_weight_energy"], rtol=1e-3)
    # A run may continue on another number of devices.
    more = train(tmp_path / "two", 1, "train.num_steps=9")
    assert [record["step"] for record in more if record["kind"] == "step"] == list(range(1, 10))


@pytest.mark.slow
def test_two_devices_score_a_few_tokens_as_one_does(tmp_path):
    # Logits of 4 rows x 16 tokens x 80,000 do not fit one block of the loss: the two scored tokens of a row are
    # gathered from it.
    task = ("data.mode=windows", "data.task.name=mqar", "data.task.vocab_size=80000")
    task += ("data.task.num_items=2", "data.task.num_valid=8", "train.num_steps=2")
    one, two = (train(tmp_path / str(devices), devices, *task) for devices in (1, 2))
    losses = [[record["loss"] for record in records if record["kind"] == "step"] for records in (one, two)]
    assert len(losses[0]) == 2
    # As above.
    np.testing.assert_allclose(*losses, rtol=1e-4)
