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
    switches that are not arrays (mode="causal").
    """

    device: Any
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    why_not(problem) is None where run computes the problem, otherwise what stands against it, for a user to read.
    divisible: the compiler can divide it among devices; a kernel it can only repeat on each of them, for all the data.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None]
    divisible: bool = True


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


def why_not_triton(problem: Problem) -> str | None:
    """What stands against any Triton kernel."""
    if compute_capability(problem.device) < 8:
        return f"it needs an NVIDIA GPU from sm_80, this is {problem.device}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; the extras cuda12 and cuda13 bring it"
    return None


def _may_be_divided() -> bool:
    """Whether the compiler may divide a computation traced now among devices, as far as that is known while tracing.

    Not with a single device, nor inside a `jax.shard_map` over all axes, where every device sees its part alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_types) and set(mesh.axis_types) == {jax.sharding.AxisType.Manual}
    return jax.device_count() > 1 and not manual


def choose(operation: str, table: Sequence[Implementation], name: str | None, problem: Problem) -> Implementation:
    """The implementation called name, or with name None the first of table (fastest first) that can run problem.

    Where the computation may be divided among devices, only divisible ones are taken with name None.

    Raises ValueError, with the reason, when name is unknown or cannot run problem.
    """
    if name is None:
        divided = _may_be_divided()
        suited = (entry for entry in table if entry.divisible or not divided)
        return next(entry for entry in suited if entry.why_not(problem) is None)
    for entry in table:
        if entry.name == name:
            reason = entry.why_not(problem)
            if reason is not None:
                raise ValueError(f"{operation}: implementation {name!r} cannot run this call: {reason}")
            return entry
    known = ", ".join(repr(entry.name) for entry in table)
    raise ValueError(f"{operation}: implementation {name!r} is not in this version of the package; it has {known}")
