"""Times public PyTorch kernels of the Hebbian scan's recurrence on a GPU, for the table of benchmarks/kernels.py.

    python benchmarks/peers.py 8x16x4096x64 [FIRST [BEYOND_LAST]]

One JSON object a line: name, and either why_not or forward and both (forward with backward; ms, median of the replays
of a CUDA graph) and bytes (the most that forward with backward holds beyond its inputs). They run in a process of their
own: PyTorch and JAX do not share a device's memory. One that fails ends the process; `measure` goes on with the next.

Their kernels are compiled in many variants, for minutes: `compile_all` does so for all of them at once, side by side,
and `_shorten_tuning` leaves out variants that lose on Hopper wherever a kernel has more than 24.
"""

# These packages are no dependencies of ours; those that are missing are named.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_ITERATIONS = 20
_MOST_VARIANTS = 24


@dataclasses.dataclass(frozen=True)
class Arrays:
    """q, k, v, dy (B, N, H, D) bfloat16 and log_decay (B, N, H) float32, torch tensors."""

    q: Any
    k: Any
    v: Any
    dy: Any
    log_decay: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """function(*inputs) is the forward; dy the cotangent in its layout."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    dy: Any


def _fla(name: str) -> Callable[[Arrays], Call]:
    def prepare(arrays: Arrays) -> Call:
        # On Hopper it refuses its backward with Triton 3.4 to 3.7, where gradients of narrow tiles come out wrong.
        # Lifted here: wrong gradients take the same time.
        checks: Any = importlib.import_module("fla.ops.common.chunk_o")
        checks.TRITON_ABOVE_3_7_1 = True
        scan = getattr(importlib.import_module("fla.ops.simple_gla"), name)
        inputs = (arrays.q, arrays.k, arrays.v, arrays.log_decay)
        return Call(lambda q, k, v, g: scan(q, k, v, g, scale=q.shape[-1] ** -0.5)[0], inputs, arrays.dy)

    return prepare


def _mamba(arrays: Arrays) -> Call:
    """State-space duality: decays exp(dt A) with A = -1; what dt adds to a write is divided out of the values."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    dt = -arrays.log_decay
    x = (arrays.v.float() / dt[..., None]).to(arrays.v.dtype)
    rates = -torch.ones(dt.shape[-1], device=dt.device)
    return Call(
        lambda q, k, x, dt: mamba_chunk_scan_combined(x, dt, rates, k, q, 256), (arrays.q, arrays.k, x, dt), arrays.dy
    )


def _mlstm(arrays: Arrays) -> Call:
    """The mLSTM with sigmoid gates and without its normaliser; its forget gate takes logits, its input gate is open."""
    import torch
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import mlstm_siging_chunkwise__xl_chunk

    def heads_first(x: Any) -> Any:
        return x.transpose(1, 2).contiguous()

    log_decay = heads_first(arrays.log_decay)
    forget = log_decay - torch.log(-torch.expm1(log_decay))
    inputs = (*(heads_first(x) for x in (arrays.q, arrays.k, arrays.v)), torch.full_like(forget, 30.0), forget)

    def function(*inputs: Any) -> Any:
        dtype = inputs[0].dtype
        return mlstm_siging_chunkwise__xl_chunk(*inputs, normalize=False, chunk_size=128, autocast_kernel_dtype=dtype)

    return Call(function, inputs, heads_first(arrays.dy))


_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

# Name in the table, the package it needs, how to call it.
PEERS: tuple[tuple[str, str, Callable[[Arrays], Call]], ...] = (
    ("fla chunk", "fla", _fla("chunk_simple_gla")),
    ("fla fused", "fla", _fla("fused_chunk_simple_gla")),
    ("mlstm sigmoid", "mlstm_kernels", _mlstm),
    ("mamba2 ssd", "mamba_ssm", _mamba),
)


def _arrays(batch: int, heads: int, num_tokens: int, width: int) -> Arrays:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator)

    q, k, v, dy = (normal(batch, num_tokens, heads, width).to(torch.bfloat16) for _ in range(4))
    return Arrays(q, k, v, dy, torch.nn.functional.logsigmoid(normal(batch, num_tokens, heads)) / 16)


def _milliseconds(call: Callable[[], Any]) -> float:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # autotuning, and buffers that a graph must not allocate
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    times = []
    for _ in range(_ITERATIONS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del kept
    return statistics.median(times[1:])


def _time(prepare: Callable[[Arrays], Call], arrays: Arrays) -> dict[str, float]:
    import torch

    call = prepare(arrays)
    inputs = tuple(x.detach().requires_grad_() for x in call.inputs)

    def forward() -> Any:
        with torch.no_grad():
            return call.function(*inputs)

    def both() -> Any:
        y = call.function(*inputs)
        return y, torch.autograd.grad(y, inputs, call.dy.to(y.dtype), allow_unused=True)

    times = {"forward": _milliseconds(forward), "both": _milliseconds(both)}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    return {**times, "bytes": torch.cuda.max_memory_allocated() - before}


def _shorten_tuning() -> None:
    """Fewer variants of the kernels that have most, and a shorter look at each, from now on."""
    autotuner: Any = importlib.import_module("triton.runtime.autotuner").Autotuner
    bench: Any = importlib.import_module("triton.testing").do_bench
    initialise = autotuner.__init__

    def fewer(self: Any, function: Any, names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        if configs and len(configs) > _MOST_VARIANTS:
            configs = [config for config in configs if config.num_warps in (2, 4)] or configs
        initialise(self, function, names, configs, *rest, **options)

    autotuner.__init__ = fewer
    autotuner.do_bench = property(lambda _: lambda call, quantiles: bench(call, warmup=4, rep=16, quantiles=quantiles))


def compile_all(shapes: list[str], seconds: float) -> None:
    """Runs every peer at every shape side by side, for what stays in Triton's cache; in at most so many seconds."""
    commands = [(sys.executable, __file__, shape, str(n), str(n + 1)) for n in range(len(PEERS)) for shape in shapes]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(command, **_QUIET)) for command in commands]
        end = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def measure(shape: str, seconds: float) -> list[dict[str, Any]]:
    """Results of all peers at a shape, as the module prints them, in at most so many seconds."""
    found: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    while len(found) < len(PEERS):
        command = [sys.executable, __file__, shape, str(len(found))]
        try:
            left = max(end - time.monotonic(), 0)
            run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            output, failure = run.stdout, run.stderr.strip().rpartition("\n")[2][:150] or f"ended with {run.returncode}"
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            failure = f"not done after {seconds:.0f} s"
        found += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        if len(found) < len(PEERS):
            found.append({"name": PEERS[len(found)][0], "why_not": failure})
    return found


def main() -> None:
    shape, *which = sys.argv[1:]
    first, last = int(which[0]) if which else 0, int(which[1]) if len(which) > 1 else None
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its Triton kernels, whatever else is installed
    # No choice of a variant is kept that was made while others used the device.
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")
    arrays = None
    if importlib.util.find_spec("triton") is not None:
        _shorten_tuning()
    for name, package, prepare in PEERS[first:last]:
        missing = [module for module in ("torch", package) if importlib.util.find_spec(module) is None]
        if missing:
            result: dict[str, Any] = {"why_not": f"not installed: {', '.join(missing)}"}
        else:
            arrays = arrays or _arrays(*(int(size) for size in shape.split("x")))
            result = _time(prepare, arrays)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
