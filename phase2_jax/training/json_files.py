"""Strict JSON and files that are either old or new, never half written."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def to_plain(value: Any) -> Any:
    """Python data that strict JSON can hold: non-finite numbers become None, tuples and arrays become lists.

    Finite floats survive a round trip through ``dumps`` bit for bit.

    Raises:
        TypeError: for anything that has no such form.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return to_plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumps(value: Any) -> str:
    """One line of strict JSON (no NaN or Infinity literals)."""
    return json.dumps(to_plain(value), allow_nan=False, ensure_ascii=False)


def round_significant(value: Any, digits: int) -> Any:
    """``value`` with every finite float in it rounded to ``digits`` significant decimal digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits - 1}e}") if math.isfinite(value) else value
    if isinstance(value, Mapping):
        return {key: round_significant(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_significant(item, digits) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return round_significant(value.tolist(), digits)
    return value


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Replace ``path`` by ``lines`` (which bring their newlines); a crash leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
