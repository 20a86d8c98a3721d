"""Reading a compiled program: every launch, as often as it happens, with what it moves."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import hlo
from benchmarks.kernel_classes import Kernel, classify

ROOT = Path(__file__).parents[2]

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8,4])->f32[8,4]}

%fused_slice (param_0: f32[6,8,4], param_1: s32[]) -> bf16[1,8,4] {
  %param_0 = f32[6,8,4]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,4]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %half = bf16[1,8,4]{2,1,0} convert(%cut)
}

%stored (param_0.1: f32[6,8,4], param_1.1: f32[1,8,4], param_2: s32[]) -> f32[6,8,4] {
  %param_0.1 = f32[6,8,4]{2,1,0} parameter(0)
  %param_1.1 = f32[1,8,4]{2,1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[6,8,4]{2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero.1, %zero.1)
}

%body (carry: (s32[], f32[6,8,4])) -> (s32[], f32[6,8,4]) {
  %carry = (s32[], f32[6,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[6,8,4]{2,1,0} get-tuple-element(%carry), index=1
  %read = bf16[1,8,4]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/slice"}
  %made = f32[1,8,4]{2,1,0} custom-call(%read), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/scan"}
  %written = f32[6,8,4]{2,1,0} fusion(%stack, %made, %i), kind=kLoop, calls=%stored
  ROOT %next = (s32[], f32[6,8,4]{2,1,0}) tuple(%i, %written)
}

%condition (carry.1: (s32[], f32[6,8,4])) -> pred[] {
  %carry.1 = (s32[], f32[6,8,4]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (start: f32[6,8,4]) -> f32[6,8,4] {
  %start = f32[6,8,4]{2,1,0} parameter(0)
  %first = s32[] constant(0)
  %begin = (s32[], f32[6,8,4]{2,1,0}) tuple(%first, %start)
  %loop = (s32[], f32[6,8,4]{2,1,0}) while(%begin), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  %stack.1 = f32[6,8,4]{2,1,0} get-tuple-element(%loop), index=1
  ROOT %copy = f32[6,8,4]{2,1,0} copy(%stack.1)
}
"""


def test_launches_in_loops_count_as_often_as_they_happen():
    found = hlo.launches(PROGRAM)
    assert [(x.name, x.operation, x.count) for x in found] == [
        ("read", "jit(step)/slice", 6),
        ("mosaic_gpu_v2", "jit(step)/scan", 6),
        ("written", "", 6),
        ("copy", "", 1),
    ]
    # 32 numbers a slice: read in float32 and written in bfloat16, read and written, read and written; 192 in the copy.
    assert [x.bytes_each for x in found] == [4 + 128 + 64, 64 + 128, 4 + 128 + 128, 2 * 768]
    assert hlo.sums(found) == (19, 6 * (196 + 192 + 260) + 1536)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("pred[3]{0}", 3),
        ("bf16[]", 2),
        ("(f32[2,3]{1,0}, s32[])", 28),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[6]{0}", 3),
        ("c64[2]{0}", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_every_type(shape, expected):
    assert hlo.num_bytes(shape) == expected


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("hebbian_scan", "Hebbian scan: its kernels"),
        ("delta_correction", "delta rule: its kernel"),
        ("resolvent_scan", "resolvent scan: its kernels"),
    ],
)
def test_a_triton_call_without_a_name_is_a_kernel_of_its_scan(scope, expected):
    operation = f"jit(train_step)/jvp()/{scope}"
    assert classify(Kernel("triton_kernel_call", f"{operation}/triton_kernel_call", 0, 0)) == expected
    assert classify(Kernel("loop_multiply_fusion", f"{operation}/mul", 0, 0)) != expected


@pytest.mark.gpu
def test_the_kernels_run_once_where_a_step_asks_once(tmp_path):
    """XLA that lets kernels write in place has run them a second time for whoever reads what they wrote."""
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 40_000)
    settings = ("--config=configs/benchmarks/throughput.py:base", f"--config.data.path={text}")
    command = [sys.executable, "benchmarks/compiled_step.py", *settings, "--config.model.num_layers=1", "--top=2000"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    launched = [int(line.split()[0]) for line in table.splitlines() if "mosaic_gpu" in line]
    # Of eight intervals each: forward once, backward twice; and once more for the monitor of the last interval.
    assert sum(launched) == 3 * 8 + 1
