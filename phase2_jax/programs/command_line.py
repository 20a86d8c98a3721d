"""What the programs that use a model share: flags of their own, one-line errors, exit statuses."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from phase2_jax.errors import INTERRUPTED_STATUS, USAGE_STATUS, UserError
from phase2_jax.training.memory_budget import is_out_of_memory


def model_flags() -> flags.FlagValues:
    """A set of flags that no other program shares, with those that choose the model."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run, as given to train.py.", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest, or the step of a checkpoint.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    return values


def run(values: flags.FlagValues, usage: str, program: Callable[[dict[str, Any]], None], smaller: str) -> None:
    """Parse `sys.argv` and run `program` on the flags' values by name; `smaller` is what to do when memory runs out.

    Exits with 0, 2 (user error, one line), 130 (Ctrl-C), or 1 with a traceback (internal error).
    """
    try:
        _parse(values, sys.argv)
        chosen = {name: values[name].value for name in values}
        if chosen["help"]:
            print(f"{usage}\n\n{values.get_help()}")
            return
        if not chosen["workdir"]:
            raise UserError("--workdir is missing: give the folder of a run, for example --workdir=runs/tiny")
        program(chosen)
    except UserError as error:
        _fail(str(error), USAGE_STATUS)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"the device is out of memory: {smaller}", USAGE_STATUS)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED_STATUS)
    except BrokenPipeError:
        # Whoever read the output has had enough; without this the interpreter complains while it closes the stream.
        sys.stdout = None
        raise SystemExit(0) from None


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")


def _fail(message: str, status: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
