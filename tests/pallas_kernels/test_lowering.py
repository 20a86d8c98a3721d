"""The Mosaic kernels lowered for a GPU on a machine without one: layouts, shared memory, and the interfaces of jax."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import delta_scan, registry
from pallas_kernels.hebbian import mosaic, parts, sweep

HOPPER = AbstractMesh(
    (2,),
    ("rows",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
)


def arguments(batch: int, num_tokens: int, heads: int, keys: int, values: int, lead: tuple[int, ...] = ()):
    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    gates = (batch, num_tokens, heads)
    vectors = (of(*gates, width, dtype=jnp.bfloat16) for width in (keys, keys, values))
    return *vectors, of(*gates), of(*gates), of(batch, heads, keys, values), of(*gates[:2], dtype=jnp.bool_)


def scan(*inputs):
    return parts.scan(*inputs, narrow_scan=functools.partial(sweep.scan, fused=mosaic.FUSED), widest=128)


def gradients(*inputs):
    (y, final), pullback = jax.vjp(lambda *differentiable: scan(*differentiable, inputs[6]), *inputs[:6])
    return pullback((y, final))


def launches(function, inputs) -> int:
    with jax.sharding.use_abstract_mesh(HOPPER):
        lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))
    # Functions that are called twice are lowered once.
    return lowered.as_text().count("stablehlo.custom_call @mosaic_gpu_v2")


# (B, N, H, K, V): 2 and 4 programs are cut into segments, which takes a launch more in each direction. Narrow and
# unequal widths are those of the next wider kernel.
@pytest.mark.parametrize(
    ("function", "sizes", "lead", "expected"),
    [
        (scan, (40, 70, 2, 64, 64), (), 1),
        (scan, (1, 1000, 2, 128, 128), (), 2),
        (scan, (1, 1000, 1, 256, 128), (), 2),
        (scan, (65_536, 64, 1, 64, 64), (), 1),
        (scan, (1, 1000, 2, 64, 64), (3, 2), 2),
        (gradients, (40, 70, 2, 64, 64), (), 3),
        pytest.param(gradients, (1, 600, 2, 96, 16), (), 5, marks=pytest.mark.slow),
        (gradients, (1, 1000, 2, 128, 128), (2,), 5),
    ],
)
def test_lowers_for_a_gpu(function, sizes, lead, expected):
    for _ in lead:
        function = jax.vmap(function)
    assert launches(function, arguments(*sizes, lead=lead)) == expected


@pytest.mark.parametrize("tokens", [200, 1000])
def test_corrected_values_go_through_the_kernels(monkeypatch, tokens):
    monkeypatch.setattr(registry, "default_device", lambda: SimpleNamespace(platform="gpu", compute_capability="9.0"))
    monkeypatch.setattr(registry, "has_triton", lambda: False)

    def corrected(*inputs):
        return delta_scan(*inputs[:6], reset=inputs[6])

    assert launches(corrected, arguments(2, tokens, 2, 64, 64)) == 1


def test_a_part_of_the_rows_for_each_device():
    part = jax.shard_map(scan, mesh=HOPPER, in_specs=P("rows"), out_specs=P("rows"), check_vma=False)
    assert launches(part, arguments(80, 70, 2, 64, 64)) == 1


def test_what_a_gpu_cannot_hold_is_refused():
    plan = sweep.Plan(values=64, stages=8, segment=4)
    deep = dataclasses.replace(mosaic.FUSED, forward_plan=lambda *_: plan)
    with pytest.raises(ValueError, match="shared memory"):
        launches(functools.partial(sweep.scan, fused=deep), arguments(1, 64, 1, 128, 128))
