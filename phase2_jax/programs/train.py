"""What `train.py` does around `training.train.train`: flags, one-line errors, exit statuses."""

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from phase2_jax.errors import INTERRUPTED_STATUS, USAGE_STATUS, UserError, refused_write
from phase2_jax.reporting.drawing import save
from phase2_jax.reporting.plots import learning_rate_test, write_plots
from phase2_jax.training.config import ExperimentConfig, default_config, did_you_mean, from_config_dict
from phase2_jax.training.lr_finder import find_learning_rate, write_range_test
from phase2_jax.training.setup import PHASE2, Architecture
from phase2_jax.training.signals import Interrupted
from phase2_jax.training.train import train
from phase2_jax.training.workdir import PLOTS, flatten, make_writable

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, for example configs/tiny.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, histories, TensorBoard files, plots.")
_RESUME = flags.DEFINE_bool("resume", True, "Continue the run that workdir holds; --noresume refuses such a workdir.")
_LR_FIND = flags.DEFINE_bool("lr_find", False, "Only find a learning rate: plot and figures go to workdir/plots.")


def main(architecture: Callable[[], Architecture] = lambda: PHASE2) -> None:
    """Parse the command line and train the model that `architecture` then names; exits with 0, 2 (user error), 128 +
    signal, or 1 with a traceback (internal error).
    """
    app.run(partial(_run, architecture), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: settings are written --config.group.name=value")
        if _CONFIG.value is None:
            raise UserError("--config is missing: give one, for example --config=configs/tiny.py")
        _check_config_file()
        if not _WORKDIR.value:
            raise UserError("--workdir is missing: give a folder for the run, for example --workdir=runs/tiny")
    except UserError as error:
        _fail(str(error))
    except SyntaxError as error:
        _fail(f"--config: {error.filename}, line {error.lineno}: {error.msg}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _fail(_explain(error, argv))
    return rest


def _check_config_file() -> None:
    """config_flags keeps quiet about a file it could not load until somebody asks for a value."""
    try:
        _CONFIG.value.to_dict()
    except OSError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        # What ml_collections puts before it names the flag by a name of its own.
        raise UserError(f"--config cannot be read: {reason[max(0, reason.rfind('[Errno')) :]}") from error


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line about a command line or a configuration file that absl or ml_collections refused."""
    text = str(error.args[0] if error.args else error)
    if "Traceback" in text:
        # ml_collections puts the whole of what a configuration file raised into its message; its end says what it was.
        text = f"{text.partition(':')[0]}: {text.strip().splitlines()[-1]}"
    text = " ".join(text.split())
    if re.search(r"get_config\(\) takes 0 positional arguments", text):
        given = next((argument for argument in argv if re.match("--?config=", argument)), argv[-1])
        file, _, variant = given.partition("=")[2].rpartition(":")
        return f"--config={file}:{variant}: {file} has no variants: leave out :{variant}"
    if isinstance(error, flags.UnrecognizedFlagError) and "Did you mean" not in text:
        return f"{text}: settings are written --config.group.name=value (README.md has them for the original's flags)"
    for argument in argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if not name.startswith("config."):
            continue
        problem = _override_problem(name.removeprefix("config."), value)
        if problem:
            return problem
    unknown = re.search(r"Key \"(\w+)\" does not exist", text)
    if unknown and isinstance(error, AttributeError):
        where = traceback.extract_tb(error.__traceback__)
        line = next((frame for frame in where if frame.name == "get_config"), where[-1])
        known = {name.rpartition(".")[2] for name in flatten(default_config().to_dict())}
        return f"{line.filename}, line {line.lineno}: {unknown[1]} does not exist{did_you_mean(unknown[1], known)}"
    return text


def _override_problem(path: str, value: str) -> str | None:
    node = default_config()
    *groups, leaf = path.split(".")
    for depth, name in enumerate([*groups, leaf]):
        if not isinstance(node, ConfigDict):
            return f"--config.{path}: {'.'.join(groups[:depth])} is a value, not a group of settings"
        if name not in node:
            where = ".".join(["config", *groups[:depth], name])
            return f"--{where} does not exist{did_you_mean(name, list(node))}"
        node = node[name]
    if isinstance(node, ConfigDict):
        return f"--config.{path} is a group: set one of {', '.join(sorted(node))} in it"
    wanted = type(node)
    try:
        if wanted in (int, float):
            wanted(value)
        elif wanted is bool and value.lower() not in ("true", "false", "1", "0"):
            raise ValueError
    except ValueError:
        return f"--config.{path}={value!r} must be of type {wanted.__name__}"
    return None


def _run(architecture: Callable[[], Architecture], argv: Sequence[str]) -> None:
    del argv
    # absl's flag parsing turned on a stream of orbax's own messages.
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("Warning: %(message)s"))
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
    try:
        config = from_config_dict(_CONFIG.value)
        workdir = Path(str(_WORKDIR.value))
        if _LR_FIND.value:
            _find_learning_rate(config, workdir, architecture())
            return
        train(
            config,
            workdir,
            resume=_RESUME.value,
            overrides=config_flags.get_override_values(flags.FLAGS["config"]),
            architecture=architecture(),
        )
        write_plots(workdir)
    except UserError as error:
        _fail(str(error))
    except Interrupted as error:
        _fail(f"{error}; run the same command again to continue", 128 + error.signum)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED_STATUS)
    except Exception as error:
        if (reason := refused_write(error)) is None:
            raise
        path = getattr(error, "filename", None) or _WORKDIR.value
        _fail(f"{path} cannot be written to ({reason}): make room there, then run the same command again to continue")


def _find_learning_rate(config: ExperimentConfig, workdir: Path, architecture: Architecture) -> None:
    folder = workdir / PLOTS
    make_writable(folder, "choose another --workdir")
    test = find_learning_rate(config, architecture=architecture, progress=print)
    write_range_test(test, folder)
    path = save(learning_rate_test(test), folder / "lr_find.png")
    print(f"Suggested learning rate: --config.optimizer.learning_rate={test.suggestion:g} (curve: {path})")


def _fail(message: str, status: int = USAGE_STATUS) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
