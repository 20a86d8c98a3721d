"""Time per token of writing text: `python benchmarks/decode.py [--tokens=100000] [--rows=1]`.

A model of the tiny preset with random parameters (its speed is that of a trained one) writes, and the median time per token is
printed around token 100, in the middle and at the end.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

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
    memory, logits_V = decoder.start()
    rows, logits, seen = (
        jax.tree.map(lambda leaf: jnp.repeat(leaf[None], arguments.rows, axis=0), tree)
        for tree in (memory, logits_V, jnp.zeros(logits_V.shape, bool))
    )
    keys = jax.random.split(jax.random.key(0), arguments.rows)
    filters = make_filters(GenerationConfig())
    started = time.perf_counter()
    jax.block_until_ready(decoder.write(rows, logits, seen, keys, 0, 0, filters))
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    seconds = []
    for first in range(0, arguments.tokens, STEPS_PER_CALL):
        started = time.perf_counter()
        rows, logits, seen, _ = jax.block_until_ready(
            decoder.write(rows, logits, seen, keys, first, STEPS_PER_CALL, filters)
        )
        seconds.append((time.perf_counter() - started) / STEPS_PER_CALL)
    calls = min(100, len(seconds) // 3)
    middle = len(seconds) // 2
    for name, part in (
        ("start", seconds[:calls]),
        ("middle", seconds[middle : middle + calls]),
        ("end", seconds[-calls:]),
        ("all", seconds),
    ):
        median = statistics.median(part)
        print(f"{name:6} {1e6 * median:7.1f} µs/token (best {1e6 * min(part):.1f}), {arguments.rows / median:,.0f} tokens/s")


if __name__ == "__main__":
    main()
