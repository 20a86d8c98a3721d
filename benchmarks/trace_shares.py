"""What share of a training step each part takes: kernel times in the trace of a run on a GPU, by class.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= python train.py --config=configs/benchmarks/throughput.py:base \\
        --workdir=runs/x --config.train.num_steps=40 --config.train.profile_steps=30:32
    python benchmarks/trace_shares.py --workdir=runs/x --top=30

Kernels of the scans are known by their names, what else belongs to a scan by the operation that a kernel computes. XLA
gives no operations to kernels that it launches as one CUDA graph; where the table says that many have none, train with
`XLA_FLAGS=--xla_gpu_enable_command_buffer=`, which launches them one by one. With `kernels.implementation=xla` only
operations tell the scans from the rest.
"""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_classes import Kernel, classify
from phase2_jax.errors import USAGE_STATUS, UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.", required=True)
_TOP = flags.DEFINE_integer("top", 15, "Largest kernels to list.")


class Trace(NamedTuple):
    steps: int
    kernels: list[Kernel]


def find_trace(workdir: Path) -> Path:
    """The newest trace of a run."""
    found = list((workdir / "profile").glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        raise UserError(
            f"{workdir / 'profile'} holds no trace: train with --config.train.profile_steps=FIRST:LAST, such as 30:32"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def read_trace(path: Path) -> Trace:
    """Steps and kernels of a trace."""
    try:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a trace ({error}): delete it and trace again") from error
    begun = {event["args"]["step_num"]: event["ts"] for event in events if _is_step(event)}
    if not begun:
        raise UserError(f"{path} names no training step: trace with --config.train.profile_steps=FIRST:LAST")
    # What the device still did of the step before the first is not in the count of steps.
    kernels = [kernel for kernel in _kernels(events) if kernel.start >= min(begun.values())]
    if not kernels:
        raise UserError(f"{path} has no kernels of a GPU: trace a run on one")
    return Trace(len(begun), kernels)


def _is_step(event: dict[str, Any]) -> bool:
    return event.get("ph") == "X" and event.get("name") == "train" and "step_num" in event.get("args", {})


def _kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    named = [event for event in events if event.get("ph") == "M" and "name" in event.get("args", {})]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}

    def on_stream(event: dict[str, Any]) -> bool:
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        return event.get("ph") == "X" and "GPU" in processes.get(event.get("pid"), "") and thread.startswith("Stream")

    return [
        Kernel(event["name"], _operation(event.get("args", {})), event["ts"], event.get("dur", 0.0))
        for event in events
        if on_stream(event)
    ]


def _operation(arguments: dict[str, Any]) -> str:
    # The argument it is in has changed its name between versions of XLA; jax begins every such path like this.
    return next((str(value) for value in arguments.values() if "jit(" in str(value)), "")


def _sums(kernels: list[Kernel], key: Callable[[Kernel], str]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and launches for every value of key."""
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for kernel in kernels:
        times[key(kernel)] += kernel.duration  # pyright: ignore[reportArgumentType]
        launches[key(kernel)] += 1
    return times, launches


def report(trace: Trace, top: int) -> list[str]:
    """Lines of the table."""
    steps, kernels = trace
    total = sum(kernel.duration for kernel in kernels)
    span = max(kernel.start + kernel.duration for kernel in kernels) - min(kernel.start for kernel in kernels)
    nameless = sum(not kernel.operation for kernel in kernels)
    lines = [
        f"{steps} steps; each {len(kernels) / steps:,.0f} kernels, {total / steps / 1e3:.2f} ms of them in "
        f"{span / steps / 1e3:.2f} ms; {nameless / len(kernels):.0%} of the kernels without an operation"
    ]

    def rows(key: Callable[[Kernel], str], count: int | None) -> None:
        times, launches = _sums(kernels, key)
        for label, time in times.most_common(count):
            figures = f"{time / total:>6.1%} {time / steps / 1e3:>10.3f} {launches[label] / steps:>11,.1f}"
            lines.append(f"{figures}  {label}")

    lines += ["", f"{'share':>6} {'ms a step':>10} {'kernels':>11}  class"]
    rows(classify, None)
    lines += ["", f"{'share':>6} {'ms a step':>10} {'kernels':>11}  kernel"]
    rows(lambda kernel: kernel.name, top)
    return lines


def main(argv: list[str]) -> int:
    del argv
    try:
        lines = report(read_trace(find_trace(Path(_WORKDIR.value))), _TOP.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_STATUS
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    app.run(main)
