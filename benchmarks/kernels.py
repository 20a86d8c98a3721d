"""Time and memory of both scans on a GPU, forward and forward with backward, beside their floor and their peers.

    python benchmarks/kernels.py                                  # all implementations that run on this device
    python benchmarks/kernels.py --implementations=mosaic --shapes=8x16x4096x64

Times are sums over all kernels of a call (CUPTI), median of the iterations, so launch gaps do not count. The floor is
what must move, every input read and every output written once, at --bandwidth. Memory is the most that forward with
backward holds beyond its inputs. Kernels of other projects that are installed are timed first (peers.py).
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import peers
from absl import app, flags
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import hebbian_scan, resolvent_scan

_SHAPES = flags.DEFINE_list(
    "shapes",
    ["8x16x4096x64", "4x16x8192x128", "1x8x65536x64", "32x8x1024x64"],
    "Sizes B x H x N x K, or B x H x N x K x V.",
)
_RESOLVENT = flags.DEFINE_list("resolvent", ["8x8x16384"], "Sizes B x H x N of the resolvent scan.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["xla", "mosaic", "triton"], "What to time.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 4.3e12, "Bytes per second of the device, as a copy measures it.")
_PEERS = flags.DEFINE_integer(
    "peers", 300, "Seconds for compiling the kernels of others, and again for timing them at each shape; 0: none."
)
_ITERATIONS = flags.DEFINE_integer("iterations", 20, "Timed calls.")


def _hebbian(batch: int, heads: int, num_tokens: int, *widths: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    of_vectors = zip(keys[:3], (widths[0], widths[0], widths[-1]), strict=True)
    vectors = [jax.random.normal(key, (batch, num_tokens, heads, width), jnp.bfloat16) for key, width in of_vectors]
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], (batch, num_tokens, heads))) / 16
    return *vectors, log_decay, jax.random.uniform(keys[4], (batch, num_tokens, heads))


def _resolvent(batch: int, heads: int, num_tokens: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 2)
    v, gamma = (jax.random.normal(key, (batch, num_tokens, heads)) for key in keys)
    return v, jnp.abs(gamma), jnp.ones(heads), jnp.zeros(heads), jnp.full(heads, 0.1)


def _both(scan: Callable, arguments: tuple[jax.Array, ...]) -> Any:
    """Results, and gradients for cotangents like the results; what is no result to a user has none."""
    results, pullback = jax.vjp(lambda *arguments: scan(*arguments)[:-1], *arguments)
    return results, pullback(results)


def _milliseconds(compiled: jax.stages.Compiled, *arguments: Any) -> float:
    _, times = profiler.measure(compiled, iterations=_ITERATIONS.value)(*arguments)
    assert times is not None
    return statistics.median(times)


def _row(name: str, forward: float, both: float, size: float | None = None) -> None:
    memory = "" if size is None else f" {size / 2**20:8.0f}"
    print(f"    {name:13} {forward:8.3f} {both:8.3f}{memory}", flush=True)


def _time(name: str, scan: Callable, arguments: tuple[jax.Array, ...]) -> None:
    scan = partial(scan, implementation=name)
    try:
        forward = jax.jit(scan).lower(*arguments).compile()
    except ValueError as error:
        print(f"    {name:13} {error}")
        return
    both = jax.jit(partial(_both, scan)).lower(arguments).compile()
    memory = both.memory_analysis()
    held = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    _row(name, _milliseconds(forward, *arguments), _milliseconds(both, arguments), held)


def _table(title: str, scan: Callable, arguments: tuple[jax.Array, ...], forward: int, backward: int) -> None:
    """Rows of our implementations, below the floor for so many bytes."""
    print(title)
    _row("floor", *(1e3 * count / _BANDWIDTH.value for count in (forward, forward + backward)))
    for name in _IMPLEMENTATIONS.value:
        _time(name, scan, arguments)


def main(argv: list[str]) -> None:
    del argv
    # Before this process takes the device's memory. They have K and V alike.
    theirs = [shape for shape in _SHAPES.value if shape.count("x") == 3] if _PEERS.value else []
    if theirs:
        peers.compile_all(theirs, _PEERS.value)
    others = {shape: peers.measure(shape, _PEERS.value) for shape in theirs}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ms forward, forward + backward, MiB")
    for shape in _SHAPES.value:
        sizes = [int(size) for size in shape.split("x")]
        rows, keys, values = math.prod(sizes[:3]), sizes[3], sizes[-1]
        # q, k, v, y and their cotangents in bfloat16; the decay and its cotangent in float32.
        bytes_moved = rows * (4 * (keys + values) + 4), rows * (8 * keys + 6 * values + 8)
        _table(f"hebbian_scan in bfloat16, B x H x N x K (x V) {shape}", hebbian_scan, _hebbian(*sizes), *bytes_moved)
        for peer in others.get(shape, []):
            if "why_not" in peer:
                print(f"    {peer['name']:13} {peer['why_not']}")
            else:
                _row(peer["name"], peer["forward"], peer["both"], peer["bytes"])
    for shape in _RESOLVENT.value:
        sizes = tuple(int(size) for size in shape.split("x"))
        # v, gamma, both parts of g, and their cotangents.
        bytes_moved = 16 * math.prod(sizes), 24 * math.prod(sizes)
        _table(f"resolvent_scan in float32, B x H x N {shape}", resolvent_scan, _resolvent(*sizes), *bytes_moved)


if __name__ == "__main__":
    app.run(main)
