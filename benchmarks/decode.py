"""Time per token of writing text: `python benchmarks/decode.py [--tokens=100000] [--rows=1]`.

A model of the tiny preset with random parameters (its speed is that of a trained one) writes; then calls near the start
and at the end of the text are timed in turns.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phase2_jax.data.tokenizers import ByteTokenizer
from phase2_jax.inference.decoding import STEPS_PER_CALL, Decoder
from phase2_jax.inference.loading import LoadedModel
from phase2_jax.inference.sampling import GenerationConfig, make_filters
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.training.config import from_config_dict
from phase2_jax.training.setup import resolve_model

EARLY = 100
ROUNDS = 200
PRESET = Path(__file__).parents[1] / "configs" / "tiny.py"


def tiny_model() -> LoadedModel:
    """The preset as it is before training."""
    spec = importlib.util.spec_from_file_location("preset", PRESET)
    assert spec is not None
    assert spec.loader is not None
    preset = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preset)
    config = from_config_dict(preset.get_config())
    model_config = resolve_model(config.model, ByteTokenizer.vocab_size)
    seq_len = config.train.seq_len
    params = nnx.jit(lambda: nnx.split(LanguageModel(model_config, seq_len=seq_len, rngs=nnx.Rngs(0)))[1])()
    return LoadedModel(config, model_config, params, ByteTokenizer(), Path("tiny"), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1)
    arguments = parser.parse_args()
    decoder = Decoder(tiny_model())
    filters = make_filters(GenerationConfig())
    keys = jax.random.split(jax.random.key(0), arguments.rows)

    def write(place: tuple[Any, jax.Array, jax.Array], first: int, count: int):
        """The place after `count` more tokens, and seconds a token."""
        started = time.perf_counter()
        rows, logits, seen, _ = jax.block_until_ready(decoder.write(*place, keys, first, count, filters))
        return (rows, logits, seen), (time.perf_counter() - started) / max(count, 1)

    start = (*decoder.start(), jnp.zeros((ByteTokenizer.vocab_size,), bool))
    place = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], arguments.rows, axis=0), start)
    print(f"compiled in {write(place, 0, 0)[1]:.1f} s")
    early = write(write(place, 0, EARLY // 2)[0], EARLY // 2, EARLY // 2)[0]
    late, seconds = early, []
    for first in range(EARLY, arguments.tokens, STEPS_PER_CALL):
        late, each = write(late, first, STEPS_PER_CALL)
        seconds.append(each)
    report(f"on the way to token {arguments.tokens:,}", seconds, arguments.rows)
    # In turns, so that whatever else the machine does hits both alike.
    pairs = [
        (write(early, EARLY, STEPS_PER_CALL)[1], write(late, arguments.tokens, STEPS_PER_CALL)[1])
        for _ in range(ROUNDS)
    ]
    report(f"at token {EARLY}", [a for a, _ in pairs], arguments.rows)
    report(f"at token {arguments.tokens:,}", [b for _, b in pairs], arguments.rows)
    ratios = sorted(b / a for a, b in pairs)
    print(
        f"late / early: median {statistics.median(ratios):.3f}, of the best times {best(pairs, 1) / best(pairs, 0):.3f}"
    )


def best(pairs: list[tuple[float, float]], index: int) -> float:
    return min(pair[index] for pair in pairs)


def report(name: str, seconds: list[float], rows: int) -> None:
    median = statistics.median(seconds)
    rate = rows / median
    print(f"{name:30} {1e6 * median:7.1f} µs/token (best {1e6 * min(seconds):.1f}), {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
