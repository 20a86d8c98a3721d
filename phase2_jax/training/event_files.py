"""TensorBoard's event files as files: records of a length, its checksum, an event, and its checksum."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

_HEADER, _FOOTER = 12, 4


def truncate_after(logdir: Path, step: int) -> None:
    """Drop every event beyond `step`, and what a kill left unfinished, from the event files in `logdir`.

    Readers have rules of their own for a run that began again at an earlier step, and TensorBoard's fast server keeps
    points that the new session did not reach; from the files themselves all read the same.
    """
    for path in sorted(logdir.glob("*tfevents*")):
        content = path.read_bytes()
        kept = [record for event_step, record in _records(content) if event_step <= step]
        if sum(map(len, kept)) == len(content):
            continue
        temporary = path.with_name(f"rewritten.{os.getpid()}.tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def _records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(step, whole record) of each complete event."""
    start = 0
    while start + _HEADER <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + _HEADER + length + _FOOTER
        if end > len(content):
            return
        yield Event.FromString(content[start + _HEADER : end - _FOOTER]).step, content[start:end]
        start = end
