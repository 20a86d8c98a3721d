"""`python -m phase2_jax.reporting WORKDIR [WORKDIR ...]`: pictures and one HTML page about runs."""

import argparse
import sys
from pathlib import Path

from phase2_jax.errors import INTERRUPTED_STATUS, USAGE_STATUS, UserError
from phase2_jax.interrupt import interruptible
from phase2_jax.reporting.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m phase2_jax.reporting",
        description="Draws the histories and the best (or newest) checkpoint of runs: PNG files and report.html, "
        "in the first WORKDIR's plots folder.",
    )
    parser.add_argument(
        "workdir", nargs="+", type=Path, metavar="WORKDIR", help="folder of a run; several are compared"
    )
    parser.add_argument("--passage", type=Path, metavar="FILE", help="text for the token-by-token view (UTF-8)")
    options = parser.parse_args(arguments)
    try:
        passage = None if options.passage is None else _read(options.passage)
        written = write_report(options.workdir, passage)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    for path in written:
        print(path)
    return 0


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--passage={path} cannot be read ({error}): give a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"--passage={path} holds no text: give a file with some")
    return text


if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
