"""What XLA makes of a training step for an H100, on a machine without one: launches, bytes moved, memory.

    python benchmarks/compiled_step.py --config=configs/benchmarks/throughput.py:base \\
        --config.data.path=books/train_90M.txt.xz
    python benchmarks/compiled_step.py --config=… --config.kernels.unroll_layers=no --top=40

Needs XLA for GPUs (`make setup EXTRAS=cuda13`) and no GPU. Counts are those of the program, and say nothing of times:
how many kernels a step launches and the bytes that they read and write, every array once a launch, whether or not a
cache holds it. Which of several kernels XLA takes for a product is tuned on a GPU only; here it is its first choice.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from benchmarks import hlo
from benchmarks.kernel_classes import Kernel, classify
from phase2_jax.data.corpora import load_corpus
from phase2_jax.errors import USAGE_STATUS, UserError
from phase2_jax.training import setup
from phase2_jax.training.config import from_config_dict
from phase2_jax.training.step import train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file of the run.", lock_config=True)
_TOP = flags.DEFINE_integer("top", 20, "Kernels to list, those that move most first.")
_GPU = Path(__file__).with_name("h100.textproto")


def absent_gpu() -> Any:
    """A jax.Device to compile for, with which nothing can run.

    Raises:
      UserError: there is no XLA for GPUs.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x1", target_config=_GPU.read_text()
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"XLA for GPUs is not installed ({error}): run make setup EXTRAS=cuda13") from error
    return topology.devices[0]


def compile_step(config: Any, device: Any) -> jax.stages.Compiled:
    """The training step of a configuration for `device`, its layers unrolled unless the configuration says no."""
    with config.unlocked():
        config.kernels.unroll_layers = config.kernels.unroll_layers or "yes"
    checked = from_config_dict(config)
    run, state = setup.build(checked, load_corpus(checked.data))
    place = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    rows = (checked.train.batch_size, checked.train.seq_len)
    batch = {name: jax.ShapeDtypeStruct(rows, jnp.int32) for name in ("tokens", "labels")}
    batch["reset"] = jax.ShapeDtypeStruct(rows, jnp.bool_)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    step = jax.jit(partial(train_step, run.step_config), donate_argnums=0, in_shardings=place, out_shardings=place)
    with jax.default_device(device):
        lowered = step.trace(shapes, batch).lower(lowering_platforms=("cuda",))
        return lowered.compile({"xla_gpu_autotune_level": "0"})


def report(compiled: jax.stages.Compiled, top: int) -> list[str]:
    """Lines of the table."""
    found = hlo.launches(compiled.as_text() or "")
    count, moved = hlo.sums(found)
    memory = compiled.memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    lines = [f"{count:,} launches; {moved / 1e9:.1f} GB read and written; {held / 2**20:,.0f} MiB of memory"]

    classes: dict[str, list[hlo.Launch]] = {}
    for launch in found:
        classes.setdefault(classify(Kernel(launch.name, launch.operation, 0.0, 0.0)), []).append(launch)
    lines += ["", f"{'launches':>9} {'GB':>8}  class"]
    for label, members in sorted(classes.items(), key=lambda item: -hlo.sums(item[1])[1]):
        count, moved = hlo.sums(members)
        lines.append(f"{count:>9,} {moved / 1e9:>8.2f}  {label}")
    lines += ["", f"{'launches':>9} {'MB each':>8}  kernel"]
    for launch in sorted(found, key=lambda x: -x.count * x.bytes_each)[:top]:
        lines.append(f"{launch.count:>9,} {launch.bytes_each / 1e6:>8.1f}  {launch.name}  {launch.operation}")
    return lines


def main(argv: list[str]) -> int:
    del argv
    try:
        lines = report(compile_step(_CONFIG.value, absent_gpu()), _TOP.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_STATUS
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
