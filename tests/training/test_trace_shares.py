"""Shares of a step from a trace: every kind of kernel in its row, nothing counted that is no kernel of these steps."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phase2_jax.training.profiling import FOLDER

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "trace_shares.py"
GPU, HOST = 1, 7
COMPUTE, MODULES = 10, 11


def named(kind: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def event(
    name: str, start: float, duration: float, args: dict[str, str] | None = None, pid: int = GPU, tid: int = COMPUTE
) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args or {}}


METADATA = [
    named("process", "/device:GPU:0 (a GPU)", GPU),
    named("process", "/host:CPU", HOST),
    named("thread", "Stream #13(Compute,MemcpyD2D)", GPU, COMPUTE),
    named("thread", "XLA Modules", GPU, MODULES),
    named("thread", "Stream of a host", HOST, COMPUTE),
]
STEPS = [event("train", start, 50.0, {"step_num": step}, pid=HOST) for start, step in ((100.0, "8"), (2_000.0, "9"))]
# Microseconds over both steps: 1,000 in all, so that each is a tenth of its share in percent.
KERNELS = (
    ("kernel_mosaic_gpu_kernel", 10, "jit(train_step)/jvp()/hebbian_scan/pallas_call", "Hebbian scan: its kernels"),
    ("cotangents_kernel", 12, "", "Hebbian scan: its kernels"),
    ("join_kernel", 8, "", "Hebbian scan: its kernels"),
    ("adjoint_kernel", 40, "", "resolvent scan: its kernels"),
    ("gemm_fusion_dot_3", 60, "jit(train_step)/jvp()/hebbian_scan/dot_general", "Hebbian scan: the rest"),
    ("loop_gemm_fusion_1", 20, "jit(train_step)/transpose(jvp(delta_correction))", "delta rule: the corrections"),
    ("loop_reduce_fusion", 80, "jit(train_step)/resolvent_scan/while/body/reduce", "resolvent scan: the rest"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_NNT", 300, "jit(train_step)/dot_general", "matrix products"),
    ("void splitKreduce_kernel<32>", 30, "", "matrix products"),
    ("input_scatter_fusion", 50, "", "sorting, scatter, gather"),
    ("input_reduce_fusion_2", 70, "", "reductions"),
    ("MemcpyD2D", 100, "", "copies, slices, stacking"),
    ("loop_dynamic_update_slice_fusion", 90, "", "copies, slices, stacking"),
    ("loop_multiply_fusion", 130, "", "elementwise and other"),
)


def write(workdir: Path, events: list[dict[str, Any]]) -> None:
    folder = workdir / FOLDER / "plugins" / "profile" / "2026_01_01"
    folder.mkdir(parents=True)
    (folder / "host.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def run(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_kernel_counts_once_in_its_class(tmp_path):
    events = [*METADATA, *STEPS]
    for number, (name, duration, operation, _) in enumerate(KERNELS):
        args = {"name": operation} if operation else {"hlo_op": "command_buffer"}
        events.append(event(name, 200.0 + 1_000.0 * number, float(duration), args))
    # The end of the step before, another line of the device, and the host.
    events += [
        event("gemm", 50.0, 10.0),
        event("jit_train_step", 200.0, 1e4, tid=MODULES),
        event("gemm", 200.0, 9.0, pid=HOST),
    ]
    write(tmp_path, events)

    result = run(tmp_path, "--top=1")
    assert result.returncode == 0, result.stderr
    summary, *lines = result.stdout.splitlines()
    # From 200 to 13,330 µs.
    assert summary == "2 steps; each 7 kernels, 0.50 ms of them in 6.57 ms; 64% of the kernels without an operation"
    classes, largest = "\n".join(lines).strip().split("\n\n")
    found = {}
    for line in classes.splitlines()[1:]:
        share, milliseconds, launches, label = line.split(maxsplit=3)
        found[label] = (share, float(milliseconds), float(launches))
    expected: dict[str, list[int]] = {}
    for _, duration, _, label in KERNELS:
        expected.setdefault(label, []).append(duration)
    assert found == {
        label: (f"{sum(times) / 10:.1f}%", sum(times) / 2_000, len(times) / 2) for label, times in expected.items()
    }
    assert [line.split() for line in largest.splitlines()[1:]] == [["30.0%", "0.150", "0.5", KERNELS[7][0]]]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (None, "holds no trace: train with --config.train.profile_steps="),
        ([*METADATA, event("gemm", 200.0, 10.0)], "names no training step"),
        ([*METADATA, *STEPS], "has no kernels of a GPU"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, events, said):
    if events is not None:
        write(tmp_path, events)
    result = run(tmp_path)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_trace_is_one_line(tmp_path):
    write(tmp_path, [*METADATA, *STEPS])
    (path,) = tmp_path.rglob("*.trace.json.gz")
    path.write_bytes(path.read_bytes()[:-20])
    result = run(tmp_path)
    assert result.returncode == 2
    assert "is not a trace" in result.stderr
    assert len(result.stderr.splitlines()) == 1
