"""What `generate.py` does around `inference.Generator`: flags, standard input and output."""

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from phase2_jax.errors import UserError
from phase2_jax.inference.generator import End, Generator, Piece
from phase2_jax.inference.loading import load_model
from phase2_jax.inference.sampling import GenerationConfig
from phase2_jax.inference.saved_state import check_writable
from phase2_jax.inference.text_source import decode_stream
from phase2_jax.programs import command_line

USAGE = 'python generate.py --workdir=runs/x --prompt="…" [--max_tokens=200]   (or the prompt on standard input)'
_STDIN = "-"


def main() -> None:
    """Parse the command line and generate; see `command_line.run` for exit statuses."""
    command_line.run(_flags(), USAGE, _run, "give fewer prompts at a time, or set JAX_PLATFORMS=cpu")


def _flags() -> flags.FlagValues:
    values, default = command_line.model_flags(), GenerationConfig()
    text = lambda name, value, says: flags.DEFINE_string(name, value, says, flag_values=values)  # noqa: E731
    number = lambda name, value, says: flags.DEFINE_float(name, value, says, flag_values=values)  # noqa: E731
    whole = lambda name, value, says: flags.DEFINE_integer(name, value, says, flag_values=values)  # noqa: E731
    flags.DEFINE_multi_string(
        "prompt", [], "Text to continue, - for standard input; may be repeated.", flag_values=values
    )
    whole("max_tokens", default.max_tokens, "Tokens to write; 0 only reads.")
    number("temperature", default.temperature, "Divides the logits; 0: always the likeliest token.")
    whole("top_k", default.top_k, "Only the k likeliest tokens; 0: all.")
    number("top_p", default.top_p, "Only the likeliest tokens that together reach this probability.")
    number("min_p", default.min_p, "Only tokens at least this share as likely as the likeliest.")
    number("repetition_penalty", default.repetition_penalty, "Above 1: tokens that occurred become less likely.")
    whole("seed", None, "Same seed, same text; without it every run differs.")
    flags.DEFINE_multi_string("stop", [], "Text before which to stop; may be repeated.", flag_values=values)
    text("save_state", "", "File for the memory as it is at the end (one prompt).")
    text("load_state", "", "File of a memory to begin with, instead of an empty one; --prompt=- adds standard input.")
    flags.DEFINE_bool("echo", False, "Print the prompt, too.", flag_values=values)
    return values


def _run(chosen: dict[str, Any]) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1) if chosen["seed"] is None else chosen["seed"]
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    config = GenerationConfig(**{name: chosen[name] for name in names}, seed=seed, stop=tuple(chosen["stop"]))
    config.validate()
    prompts = _prompts(chosen["prompt"], has_state=bool(chosen["load_state"]), echo=chosen["echo"])
    if chosen["save_state"] and len(prompts) > 1:
        raise UserError("--save_state keeps one memory: give a single --prompt with it")
    if chosen["save_state"]:
        check_writable(Path(chosen["save_state"]))
    generator = Generator(load_model(Path(chosen["workdir"]), chosen["checkpoint"]))
    state = generator.load_state(chosen["load_state"]) if chosen["load_state"] else None
    pieces = generator.stream(prompts, config, state=state)
    ends = _print_texts(pieces, prompts, echo=chosen["echo"])
    if chosen["save_state"]:
        generator.save_state(ends[0].state, chosen["save_state"])
    timing = generator.timing
    print(
        f"{timing.tokens:,} tokens in {timing.writing:.2f} s, {timing.tokens_per_second:,.0f} tokens/s "
        f"(prompt read in {timing.reading:.2f} s, programs compiled in {timing.compiling:.1f} s, seed {seed}, "
        f"memory at token {ends[0].state.num_tokens:,})",
        file=sys.stderr,
    )


def _prompts(given: list[str], *, has_state: bool, echo: bool) -> list[str | Iterable[str]]:
    if not given and has_state:
        return [""]
    if not given and sys.stdin.isatty():
        raise UserError("--prompt is missing: give --prompt='some text', or pipe the text in")
    if given.count(_STDIN) > 1:
        raise UserError("--prompt=- was given twice, but there is one standard input: give it once")
    if "" in given:
        raise UserError("--prompt is empty: give some text to continue")

    def stdin() -> str | Iterable[str]:
        text = decode_stream(sys.stdin.buffer, "standard input")
        # A text that is to be printed before its continuation has to be kept until then.
        return "".join(text) if echo else text

    return [stdin() if prompt == _STDIN else prompt for prompt in given or [_STDIN]]


def _print_texts(pieces: Iterator[Piece], prompts: list[str | Iterable[str]], *, echo: bool) -> list[End]:
    """Prints the first unfinished text as it is written and the others when their turn comes; returns all ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    waiting: list[list[str]] = [[] for _ in prompts]
    ends: dict[int, End] = {}
    turn = 0
    _print_head(prompts, 0, echo)
    for piece in pieces:
        waiting[piece.row].append(piece.text)
        if piece.end is not None:
            ends[piece.row] = piece.end
        while turn < len(prompts):
            print("".join(waiting[turn]), end="", flush=True)
            waiting[turn] = []
            if turn not in ends:
                break
            print(flush=True)
            turn += 1
            _print_head(prompts, turn, echo)
    return [ends[row] for row in range(len(prompts))]


def _print_head(prompts: list[str | Iterable[str]], index: int, echo: bool) -> None:
    if index >= len(prompts):
        return
    if len(prompts) > 1:
        print(f"--- {index + 1} of {len(prompts)}")
    prompt = prompts[index]
    if echo and isinstance(prompt, str):
        print(prompt, end="", flush=True)
