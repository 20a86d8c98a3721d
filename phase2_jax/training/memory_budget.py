"""How much memory a step takes, and what to change when there is not enough."""

import re
from dataclasses import dataclass
from typing import Any

import jax

from phase2_jax.errors import UserError
from phase2_jax.training.config import TrainConfig
from phase2_jax.training.step import TrainState

# Allocators lose some memory to fragments: a plan that fills more of the device is likely to fail.
USABLE = 0.9
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one device while a step runs.

    Attributes:
      parameters, optimizer, memory: of the state, which stays (the memory is that of the model, W and its like).
      working: everything a step needs besides, activations and gradients, as the compiler planned it; None where it
        does not tell.
    """

    parameters: int
    optimizer: int
    memory: int
    working: int | None

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.optimizer + self.memory

    @property
    def total(self) -> int | None:
        """Peak of a step."""
        return None if self.working is None else self.state + self.working

    def __str__(self) -> str:
        parts = [("parameters", self.parameters), ("optimizer", self.optimizer), ("memory state", self.memory)]
        if self.working is not None:
            parts.append(("activations and gradients", self.working))
        total = self.state if self.total is None else self.total
        return f"{size(total)} on each device ({', '.join(f'{name} {size(count)}' for name, count in parts)})"


def budget(state: TrainState, compiled: Any) -> MemoryBudget:
    """What a compiled step needs beside its state."""
    plan = compiled.memory_analysis()
    # Outputs that alias inputs (the donated state) need no room of their own.
    working = None
    if plan is not None:
        working = plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return MemoryBudget(
        parameters=_bytes(state.params), optimizer=_bytes(state.opt_state), memory=_bytes(state.memory), working=working
    )


def _bytes(tree: Any) -> int:
    """Bytes of the arrays' parts on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves if leaf.addressable_shards)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device had not enough memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explain(
    error: BaseException, plan: MemoryBudget | None, train: TrainConfig, capacity: int | None, devices: int = 1
) -> UserError:
    """What to lower, and to what, so that the step fits.

    Args:
      error: that of the device.
      plan: of the step, None when it did not compile.
      train: sizes it had.
      capacity: bytes a device has for arrays, None where it does not tell.
      devices: that share a micro-batch.
    """
    asked = re.search(r"allocat\w* (\d+) bytes", str(error))
    message = "out of memory" + (f" (it asked for {size(int(asked[1]))} more)" if asked else "")
    if plan is not None and plan.total is not None:
        message += f": a step needs about {size(plan.total)}"
        message += "" if capacity is None else f" and the device has {size(capacity)}"
    return UserError(f"{message}. {remedy(plan, train, capacity, devices)}")


def remedy(plan: MemoryBudget | None, train: TrainConfig, capacity: int | None, devices: int = 1) -> str:
    """The smallest change that fits, in settings; a halving where the sizes are not known.

    Activations, nearly all of `working`, are in proportion to the rows of a micro-batch and to their length. Every
    device takes as many rows as the others.
    """
    rows = train.batch_size // train.grad_accum // devices
    factor = 2.0
    if plan is not None and plan.working is not None and capacity is not None:
        room = USABLE * capacity - plan.state
        if room <= plan.working / (rows * train.seq_len):
            return (
                f"The model itself takes {size(plan.state)}: lower model.d_model or model.num_layers, "
                "or use a larger device"
            )
        factor = max(plan.working / room, 1.0 + 1e-9)
    fitting = [n for n in range(1, rows + 1) if n >= factor and rows % n == 0]
    ways = []
    if fitting:
        accumulation = train.grad_accum * fitting[0]
        ways.append(f"raise train.grad_accum from {train.grad_accum} to {accumulation} (same result, slower)")
    least = train.grad_accum * devices
    lower = int(train.batch_size / factor) // least * least
    if lower >= least:
        ways.append(f"lower train.batch_size from {train.batch_size} to {lower}")
    ways.append(f"lower train.seq_len from {train.seq_len} to {max(1, int(train.seq_len / factor))}")
    ways.append("set model.remat=True (recomputes activations)")
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    number = float(count)
    for unit in _UNITS[:-1]:
        if number < 1024:
            return f"{number:.3g} {unit}" if unit != "B" else f"{count} B"
        number /= 1024
    return f"{number:.3g} {_UNITS[-1]}"
