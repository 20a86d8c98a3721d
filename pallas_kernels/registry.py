"""How an operation picks among its implementations."""

from __future__ import annotations

import dataclasses
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
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None]


def runs_anywhere(problem: Problem) -> str | None:
    """The why_not of implementations without any limit."""
    del problem


def default_device() -> Any:
    """Device on which a computation traced now will run, as far as that is known while tracing: a jax.Device."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]


def choose(operation: str, table: Sequence[Implementation], name: str | None, problem: Problem) -> Implementation:
    """The implementation called name, or with name None the first of table (fastest first) that can run problem.

    Raises ValueError, with the reason, when name is unknown or cannot run problem.
    """
    if name is None:
        return next(entry for entry in table if entry.why_not(problem) is None)
    for entry in table:
        if entry.name == name:
            reason = entry.why_not(problem)
            if reason is not None:
                raise ValueError(f"{operation}: implementation {name!r} cannot run this call: {reason}")
            return entry
    known = ", ".join(repr(entry.name) for entry in table)
    raise ValueError(f"{operation}: implementation {name!r} is not in this version of the package; it has {known}")
