"""What `evaluate.py` does around `inference.evaluate`: flags, a table or JSON."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from phase2_jax.inference.evaluation import EvaluationConfig, evaluate
from phase2_jax.inference.evaluation_table import table
from phase2_jax.inference.loading import load_model
from phase2_jax.programs import command_line
from phase2_jax.training.json_files import dumps

USAGE = "python evaluate.py --workdir=runs/x [--checkpoint=best|latest|STEP] [--data=TEXT] [--json]"
_SECONDS_BETWEEN_LINES = 10.0


def main() -> None:
    """Parse the command line and evaluate; see `command_line.run` for exit statuses."""
    command_line.run(_flags(), USAGE, _run, "lower --batch_size, or set JAX_PLATFORMS=cpu")


def _flags() -> flags.FlagValues:
    values = command_line.model_flags()
    default = EvaluationConfig()
    flags.DEFINE_string(
        "data", default.data, "Text file or folder; empty: the run's validation text.", flag_values=values
    )
    flags.DEFINE_string("format", default.format, "auto, text or wikitext; empty: as in training.", flag_values=values)
    flags.DEFINE_string(
        "document_separator", default.document_separator, "Ends a document; empty: as in training.", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size", default.batch_size, "Windows a call; no figure depends on it.", flag_values=values
    )
    flags.DEFINE_integer("max_tokens", default.max_tokens, "Stop after so many; 0: read all.", flag_values=values)
    flags.DEFINE_bool("memory_off", default.memory_off, "Also read with eta = 0.", flag_values=values)
    flags.DEFINE_multi_integer(
        "wipe_every",
        [],
        "Also read with the memory wiped at every n-th token of a document; may be repeated.",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.", flag_values=values)
    return values


def _run(chosen: dict[str, Any]) -> None:
    fields = ("data", "format", "document_separator", "batch_size", "max_tokens", "memory_off")
    config = EvaluationConfig(**{name: chosen[name] for name in fields}, wipe_every=tuple(chosen["wipe_every"]))
    config.validate()
    loaded = load_model(Path(chosen["workdir"]), chosen["checkpoint"])
    result = evaluate(loaded, config, progress=_progress_lines())
    result["peak_rss_mb"] = _peak_rss_mb()
    print(dumps(result) if chosen["json"] else table(result))


def _progress_lines() -> Callable[[int, float], None]:
    """Says on standard error, every ten seconds, how far a long text has been read."""
    started = last = time.monotonic()

    def progress(tokens: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = tokens / (now - started)
        print(f"{tokens:,} tokens, {rate:,.0f} tokens/s, loss {loss:.4f}", file=sys.stderr, flush=True)

    return progress


def _peak_rss_mb() -> float:
    """Most memory this process ever held, MB; macOS counts bytes where Linux counts KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
