"""The memory after a text, on disk: read a book once, ask many times."""

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phase2_jax.errors import UserError
from phase2_jax.inference.loading import LoadedModel
from phase2_jax.model.language_model import ModelState, init_state

FORMAT = "phase2-jax memory state 1"
_HEADER = "header"
_LOGITS = "logits"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextState:
    """Where a model stands after a text.

    Attributes:
      memory: of one row (B = 1).
      logits_V: of the token that comes next.
      context: the text's last tokens, so that its continuation joins without a seam.
    """

    memory: ModelState
    logits_V: jax.Array
    context: tuple[int, ...] = field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return int(self.memory.position[0])


def check_writable(path: Path) -> None:
    """Find out before a long text is read whether its memory can be saved.

    Raises:
      UserError: the folder does not exist or cannot be written to, or the path is a folder.
    """
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"the folder {path.parent} does not exist"
    elif not os.access(path.parent, os.W_OK):
        reason = f"the folder {path.parent} is read-only"
    if reason:
        raise UserError(f"--save_state={path} cannot be written ({reason}): give another file")


def save_state(state: TextState, loaded: LoadedModel, path: Path) -> None:
    """Write `state` and what identifies its model; an existing file is replaced whole.

    Raises:
      UserError: the file cannot be written.
    """
    header = {"format": FORMAT, "model": loaded.fingerprint(), "step": loaded.step, "context": list(state.context)}
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in _named_leaves(state.memory).items()}
    arrays |= {_HEADER: np.array(json.dumps(header)), _LOGITS: np.asarray(state.logits_V)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--save_state={path} cannot be written ({error.strerror}): give another file") from error


def load_state(path: Path, loaded: LoadedModel) -> TextState:
    """Read what `save_state` wrote.

    Raises:
      UserError: no such file, not a state, a damaged one, or one of another model.
    """
    try:
        # numpy leaves a file that it opened itself and cannot read to the garbage collector.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            header = json.loads(str(file[_HEADER]))
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            if header["model"] != loaded.fingerprint():
                raise UserError(
                    f"--load_state={path} was saved by another model (step {header['step']}) than step {loaded.step} "
                    f"of {loaded.workdir.name}: use the --workdir and --checkpoint it was saved with, or read the text "
                    "again with --save_state"
                )
            arrays = {name: file[name] for name in file.files if name != _HEADER}
            return _assemble(arrays, tuple(int(token) for token in header["context"]), loaded)
    except OSError as error:
        raise UserError(f"--load_state={path} cannot be read ({error.strerror or error}): check the path") from error
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--load_state={path} is no memory state, or a damaged one: write one with --save_state"
        ) from error


def _assemble(arrays: dict[str, np.ndarray], context: tuple[int, ...], loaded: LoadedModel) -> TextState:
    empty = jax.eval_shape(lambda: init_state(loaded.model_config, 1))
    expected = _named_leaves(empty) | {_LOGITS: jax.ShapeDtypeStruct((loaded.model_config.vocab_size,), jnp.float32)}
    for name, leaf in expected.items():
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise ValueError(f"{name} has shape {arrays[name].shape}")
    leaves = [jnp.asarray(arrays[name]) for name in _named_leaves(empty)]
    memory = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    return TextState(memory, jnp.asarray(arrays[_LOGITS]), context)


def _named_leaves(memory: ModelState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(memory)}
