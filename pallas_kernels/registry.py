"""How an operation picks among its implementations."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation has to know to say whether it can run on device (a jax.Device).

    shapes and dtypes name every array of the call after its argument ("q", "log_decay", ...); options holds the
    switches that are not arrays (mode="causal"). tracked: JAX follows along which mesh axes the arrays vary.
    """

    device: Any
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tracked: bool = False


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    why_not(problem) is None where run computes the problem, otherwise what stands against it, for a user to read.
    kernel: it is opaque to the compiler, which cannot divide it among devices, only repeat it on each for all the data.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None]
    kernel: bool = False


def runs_anywhere(problem: Problem) -> str | None:
    """The why_not of implementations without any limit."""
    del problem


def default_device() -> Any:
    """Device on which a computation traced now will run, as far as that is known while tracing: a jax.Device."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]


def compute_capability(device: Any) -> float:
    """Of an NVIDIA GPU, such as 9.0; 0 of anything else."""
    found = str(getattr(device, "compute_capability", ""))
    return float(found) if re.fullmatch(r"\d+\.\d+", found) else 0.0


def shared_memory(device: Any) -> int:
    """KiB that a program may take on an NVIDIA GPU from sm_80 (CUDA programming guide, technical specifications)."""
    capability = compute_capability(device)
    return {8.0: 163, 8.7: 163, 9.0: 227, 10.0: 227, 10.3: 227}.get(capability, 99)


def has_triton() -> bool:
    """Whether jax-triton is installed."""
    return importlib.util.find_spec("jax_triton") is not None


def why_not_triton(problem: Problem) -> str | None:
    """What stands against any Triton kernel."""
    if compute_capability(problem.device) < 8:
        return f"it needs an NVIDIA GPU from sm_80, this is {problem.device}"
    if not has_triton():
        return "jax-triton is not installed; the extras cuda12 and cuda13 bring it"
    return None


def _may_be_divided() -> bool:
    """Whether the compiler may divide a computation traced now among devices, as far as that is known while tracing.

    Not with a single device, nor inside a `jax.shard_map` over all axes, where every device sees its part alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_types) and set(mesh.axis_types) == {jax.sharding.AxisType.Manual}
    return jax.device_count() > 1 and not manual


def varying_axes(arrays: Any) -> frozenset[str]:
    """Mesh axes along which arrays (a tree) vary, as a `jax.shard_map` that checks this knows; empty elsewhere."""
    types = (getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(arrays))
    return frozenset().union(*(found.varying for found in types if found is not None))


def vary_alike(arrays: Any) -> Any:
    """arrays (a tree) such that each varies along the axes that any of them does: carries of loops have to."""
    axes = varying_axes(arrays)

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def place_freely(run: Callable[..., Any], *results: jax.sharding.NamedSharding) -> Callable[..., Any]:
    """run such that the compiler places what is inside also where mesh axes are explicit; results: where its results
    lie then.

    Loops start from states that nobody has placed, which explicit axes would refuse.
    """
    mesh = results[0].mesh
    # Not the manual ones, which a `jax.shard_map` over some axes leaves beside them.
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    return jax.sharding.auto_axes(run, axes=explicit, out_sharding=results) if explicit else run


def placed_like(x: jax.Array, *axes: int | None) -> jax.sharding.NamedSharding:
    """Place of an array whose axes lie as those axes of x do, None as none."""
    place = jax.typeof(x).sharding
    spec = (None if axis is None else place.spec[axis] for axis in axes)
    return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*spec))


def _why_not(entry: Implementation, problem: Problem) -> str | None:
    if entry.kernel and problem.tracked:
        return "inside a jax.shard_map it needs check_vma=False"
    return entry.why_not(problem)


def choose(operation: str, table: Sequence[Implementation], name: str | None, problem: Problem) -> Implementation:
    """The implementation called name, or with name None the first of table (fastest first) that can run problem.

    Where the computation may be divided among devices, no kernel is taken with name None.

    Raises ValueError, with the reason, when name is unknown or cannot run problem.
    """
    if name is None:
        divided = _may_be_divided()
        suited = (entry for entry in table if not (entry.kernel and divided))
        return next(entry for entry in suited if _why_not(entry, problem) is None)
    for entry in table:
        if entry.name == name:
            reason = _why_not(entry, problem)
            if reason is not None:
                raise ValueError(f"{operation}: implementation {name!r} cannot run this call: {reason}")
            return entry
    known = ", ".join(repr(entry.name) for entry in table)
    raise ValueError(f"{operation}: implementation {name!r} is not in this version of the package; it has {known}")
