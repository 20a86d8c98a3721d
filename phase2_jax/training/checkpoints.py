"""Checkpoints with orbax; nothing else in the project knows orbax.

Layout: `workdir/checkpoints/<step>/{model,optimizer,memory,rng,progress}` and `workdir/best/<step>/…` of the same
form. `progress` is JSON: data position, histories, the running epoch and the configuration.
"""

import logging
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from phase2_jax.errors import UserError
from phase2_jax.training.memory_budget import is_out_of_memory
from phase2_jax.training.step import Params, TrainState

CHECKPOINTS = "checkpoints"
BEST = "best"
REPLACED = "replaced-"
ITEMS = ("model", "optimizer", "memory", "rng", "progress")
READERS_REMEDY = "name another with --checkpoint"
# What orbax says of a checkpoint that is whole, of something else.
OTHER_ARRAYS = ("tree structures do not match", "not compatible with the stored shape")
# What the reads say that a failed one leaves behind.
LEFTOVERS = ("Event loop is closed", "while reading array", "was never awaited")


def newest(directory: Path) -> Path | None:
    """The newest checkpoint in a folder, one that was set aside included, without opening any."""
    found = [path for path in directory.glob("*") if path.name.removeprefix(REPLACED).isdecimal() and path.is_dir()]
    return max(found, key=lambda path: int(path.name.removeprefix(REPLACED)), default=None)


def way_back(workdir: Path) -> str:
    """What to do about a run that has no checkpoint to continue from; the best one holds as much as any."""
    best = newest(workdir / BEST)
    copy = "" if best is None else f"copy {best} into {workdir / CHECKPOINTS} to continue from there, or "
    return f"{copy}choose another --workdir"


class CheckpointDirectory:
    """A folder of step checkpoints.

    Args:
      directory: created when missing, unless `read_only`.
      keep: the newest so many are kept.
      asynchronous: write in the background; `wait` blocks until all is on disk.
      read_only: for readers: nothing there is created, deleted or written.
    """

    def __init__(self, directory: Path, *, keep: int = 1, asynchronous: bool = False, read_only: bool = False):
        self.directory = directory.absolute()
        self._read_only = read_only
        if not read_only:
            self._put_back()
        verbosity = absl_logging.get_verbosity()
        if read_only:
            # Orbax warns that it will only read.
            absl_logging.set_verbosity(absl_logging.ERROR)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, enable_async_checkpointing=asynchronous, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.directory, item_names=ITEMS, options=options)
        absl_logging.set_verbosity(verbosity)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Write a checkpoint of `state`, in place of one of the same step."""
        step = int(state.step)
        replaced = self._set_aside(step) if step in self._manager.all_steps() else None
        save = ocp.args.StandardSave
        items = ocp.args.Composite(
            model=save(state.params),
            optimizer=save(state.opt_state),
            memory=save(_storable(state.memory)),
            rng=save({"key": jax.random.key_data(state.rng)}),
            progress=ocp.args.JsonSave(progress),
        )
        self._manager.save(step, args=items, force=True)
        if replaced is not None:
            self._manager.wait_until_finished()
            shutil.rmtree(replaced)

    def _set_aside(self, step: int) -> Path:
        """Rename a checkpoint that is to be replaced: it is the way back until the new one is whole."""
        self._manager.wait_until_finished()
        replaced = self.directory / f"{REPLACED}{step}"
        (self.directory / str(step)).rename(replaced)
        self._manager.reload()
        return replaced

    def _put_back(self) -> None:
        """Undo `_set_aside` where nothing whole took the checkpoint's place."""
        for replaced in self.directory.glob(f"{REPLACED}*"):
            place = self.directory / replaced.name.removeprefix(REPLACED)
            if place.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(place)

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
          UserError: the checkpoint is damaged.
        """
        with self._damage_reported(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
            return restored["progress"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a checkpoint with the shapes, dtypes and placement of `like`.

        Raises:
          UserError: the checkpoint is damaged or does not have these shapes.
        """
        abstract = jax.tree.map(_abstract, replace(like, rng=jax.random.key_data(like.rng)))
        restore = ocp.args.StandardRestore
        with self._damage_reported(step):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=restore(abstract.params),
                    optimizer=restore(abstract.opt_state),
                    memory=restore(abstract.memory),
                    rng=restore({"key": abstract.rng}),
                ),
            )
        key = jax.random.wrap_key_data(items["rng"]["key"])
        # Orbax hands arrays whose memory it may share with its own buffers; a step donates them, so the run gets its
        # own.
        own = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True, device=x.sharding), tree)  # noqa: E731
        return TrainState(
            params=own(items["model"]),
            opt_state=own(items["optimizer"]),
            memory=jax.tree.map(lambda x, was: x if was.size else was, own(items["memory"]), like.memory),
            rng=key,
            step=jnp.full_like(like.step, step),
            failed_step=jnp.zeros_like(like.failed_step),
        )

    def restore_params(self, step: int, like: Params) -> Params:
        """The model's parameters alone, with the shapes and dtypes of the arrays or abstract arrays `like`, on the
        default device.

        Raises:
          UserError: the checkpoint is damaged or does not have these shapes.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        with self._damage_reported(step):
            return self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(abstract)))[
                "model"
            ]

    def _damage_reported(self, step: int) -> "_DamageReported":
        return _DamageReported(self.directory / str(step), self._remedy(step))

    def _remedy(self, step: int) -> str:
        """What to do when the checkpoint cannot be read."""
        if self._read_only:
            return READERS_REMEDY
        if self.steps()[0] < step:
            return "delete that folder to continue from the one before it"
        workdir = self.directory.parent
        make_room = "" if newest(workdir / BEST) is None else "delete that folder, "
        return f"there is none before it: {make_room}{way_back(workdir)}"

    def wait(self) -> None:
        """Block until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending saves and release the folder."""
        self._manager.close()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_stored_shape(x), x.dtype, sharding=x.sharding)


def _stored_shape(x: Any) -> tuple[int, ...]:
    """Shape in a checkpoint: orbax refuses arrays without elements, such as the tail of a convolution of one tap."""
    return tuple(max(1, size) for size in x.shape)


def _storable(tree: Any) -> Any:
    """Something in the place of arrays without elements, laid out over the devices as they are."""
    return jax.tree.map(lambda x: x if x.size else jnp.zeros(_stored_shape(x), x.dtype, device=x.sharding), tree)


class _DamageReported:
    """Turns orbax's many exceptions about unreadable files into one line that names the folder and the remedy.

    When one read fails, orbax closes the event loop under the others, which end much later, each with a traceback, a
    warning or a message of asyncio's of its own: after a failure nothing is heard of them.
    """

    def __init__(self, path: Path, remedy: str):
        self.path, self.remedy = path, remedy

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable

    def _unraisable(self, unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if not any(words in said for words in LEFTOVERS):
            self._hook(unraisable)

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            sys.unraisablehook = self._hook
        else:
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # Not only the usual ones: what tensorstore refuses to read arrives as a bare Exception.
        if isinstance(error, Exception) and not is_out_of_memory(error):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". See full")[0][:200]
            if any(words in reason for words in OTHER_ARRAYS):
                raise UserError(
                    f"checkpoint {self.path} holds other arrays than the model and optimizer that this version makes "
                    "of the run's configuration: use the version that wrote it (git_revision in config.json), or "
                    "another --workdir"
                ) from error
            raise UserError(f"checkpoint {self.path} cannot be read ({reason}): {self.remedy}") from error
