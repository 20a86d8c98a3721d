"""The folder of a run: made, recognised, and never mistaken for another's."""

import dataclasses
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from phase2_jax.errors import UserError
from phase2_jax.training import json_files
from phase2_jax.training.config import ExperimentConfig

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
PLOTS = "plots"
LOCK_FILE = ".lock"
# What may differ when a run is continued; everything else would make it another run. The text itself may not: it is
# compared by what it holds, wherever it lies.
MAY_CHANGE = (
    "data.path",
    "data.valid_path",
    "train.num_epochs",
    "train.num_steps",
    "train.early_stopping.",
    "train.profile_steps",
    "logging.",
    "checkpoint.",
    "kernels.",
    "sharding.",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_workdir(workdir: Path, *, resume: bool) -> dict[str, Any] | None:
    """Make sure `workdir` is a folder a run may write to.

    Returns:
      what `write_config` stored there earlier, or None for a new run.

    Raises:
      UserError: not writable, holds something else, or holds a run although `resume` is off.
    """
    make_writable(workdir, "choose another --workdir")
    config_file = workdir / CONFIG_FILE
    if not config_file.exists():
        # A learning-rate range test leaves its plot where the run will be, and a run that was refused its lock.
        if any(path.name not in (PLOTS, LOCK_FILE) for path in workdir.iterdir()):
            raise UserError(
                f"workdir {workdir} is not empty and holds no run ({CONFIG_FILE} is missing): choose another --workdir"
            )
        return None
    if not resume:
        raise UserError(
            f"workdir {workdir} already holds a run: leave out --noresume to continue it, or choose another --workdir"
        )
    try:
        stored = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(stored["config"], dict) or not isinstance(stored["architecture"], str):
            raise TypeError("config is no object or architecture no name")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config_file} is no configuration of a run ({error}): choose another --workdir") from error
    return stored


def make_writable(folder: Path, remedy: str) -> None:
    """Make `folder` and see that files can be made in it; raises UserError with the remedy where they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from error


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Context in which no other process may train in the folder; the system ends it with the process.

    Raises:
      UserError: another process does; names it.
    """
    with (workdir / LOCK_FILE).open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{workdir} is being trained by process {file.read()}: stop that one first, or choose another --workdir"
            ) from error
        except OSError:
            # A file system without locks: nobody is kept out there.
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def plain(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as nested plain data, as it is stored."""
    return dataclasses.asdict(config)


def check_unchanged(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under another configuration. A field that is younger than the run had its default.

    Raises:
      UserError: names the first field that differs, both values, and what may change.
    """
    may_change = ", ".join(f"{name}*" if name.endswith(".") else name for name in MAY_CHANGE)
    old, new = flatten(plain(ExperimentConfig())) | flatten(stored), flatten(current)
    for name in sorted(set(old) & set(new)):
        if old[name] != new[name] and not name.startswith(MAY_CHANGE):
            raise UserError(
                f"config.{name} is {new[name]!r} but this run was started with {old[name]!r}: "
                f"use that value or another --workdir (may change: {may_change})"
            )


def check_architecture(stored: dict[str, Any], wanted: str, workdir: Path) -> None:
    """Refuse the checkpoints of a run whose layers are another's.

    Raises:
      UserError: names both.
    """
    found = stored["architecture"]
    if found != wanted:
        raise UserError(f"{workdir} holds a run of the architecture {found!r}, not {wanted!r}: give another --workdir")


def write_config(workdir: Path, config: dict[str, Any], overrides: dict[str, Any], architecture: str) -> None:
    """Store the configuration with the layers' name, the versions and the revision it ran under."""
    stored = {
        "config": config,
        "architecture": architecture,
        "overrides": overrides,
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_revision": git_revision(),
    }
    text = json.dumps(json_files.to_plain(stored), indent=2, ensure_ascii=False)
    json_files.write_atomically(workdir / CONFIG_FILE, [text, "\n"])


def git_revision() -> str | None:
    """Revision of the checkout this package runs from, None outside a checkout or without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, named like `model.snr.threshold`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
