"""Time of a training step: milliseconds and tokens per second, and how they grow with the sequence.

    python benchmarks/train_step.py                      # the sizes the original was measured at, N = 512
    python benchmarks/train_step.py --seq_lens=512,4096  # is it linear?
    python benchmarks/train_step.py --config=configs/base.py --dtype=bfloat16

Each length is timed twice in the same process, alternating: the model, and the same model with both scans replaced by
the identity, so the ratio says what the memory and the resolvent cost whatever else the machine is doing. Forward and
backward only, as in the figures of docs/performance.md; the optimizer is not timed.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.training.config import from_config_dict
from phase2_jax.training.loss import head_loss

_CONFIG = flags.DEFINE_string("config", None, "Take the architecture from this configuration file.")
_SEQ_LENS = flags.DEFINE_list("seq_lens", ["512"], "Sequence lengths to time.")
_BATCH = flags.DEFINE_integer("batch", 2, "Rows.")
_VOCAB = flags.DEFINE_integer("vocab", 10_000, "Vocabulary.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Compute type of the matrix products.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; the median counts.")
_SCANS = flags.DEFINE_string("implementation", "", "Implementation of the scans; empty picks the fastest.")

# What the original's forward and backward takes on 2 cores at B 2, N 512 and the default sizes here.
ORIGINAL_MS = 1956.0


def _model_config() -> ModelConfig:
    if _CONFIG.value:
        spec = importlib.util.spec_from_file_location("benchmarked_config", _CONFIG.value)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = from_config_dict(module.get_config()).model
    else:
        config = ModelConfig(
            d_model=256, num_layers=4, num_heads=4, head_dim=64, consolidation=ConsolidationConfig(256)
        )
    return replace(config, vocab_size=_VOCAB.value, dtype=_DTYPE.value)


def _identity_hebbian(q, k, v, log_decay, eta, initial_state=None, *, reset=None, implementation=None):
    del k, log_decay, reset, implementation
    return v * eta[..., None] + jnp.mean(q, axis=-1, keepdims=True), initial_state


def _identity_delta(q, k, v, log_decay, eta, initial_state=None, *, reset=None, implementation=None):
    return *_identity_hebbian(q, k, v, log_decay, eta, initial_state, reset=reset, implementation=implementation), v


def _identity_resolvent(v, gamma, u, z_re, z_im, initial_g=None, *, reset=None, mode="causal", implementation=None):
    del reset, mode, implementation
    return v * u + z_re, gamma + z_im, initial_g


def _gradient(config: ModelConfig, seq_len: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    model = LanguageModel(config, seq_len=seq_len, rngs=nnx.Rngs(params=0), implementation=_SCANS.value or None)
    graphdef, params = nnx.split(model)
    tokens_BxN = jax.random.randint(jax.random.key(1), (_BATCH.value, seq_len + 1), 0, config.vocab_size)

    def loss(params, state, tokens_BxN):
        interval = config.consolidation.interval
        aligned = interval > 0 and seq_len % interval == 0
        model = nnx.merge(graphdef, params)
        hidden, state, _ = model(tokens_BxN[:, :-1], state, aligned=aligned, logits=False)
        return head_loss(hidden, model.head_matrix(), tokens_BxN[:, 1:]) / tokens_BxN[:, 1:].size, state

    return jax.value_and_grad(loss, has_aux=True), (params, init_state(config, _BATCH.value), tokens_BxN)


def _compiled(config: ModelConfig, seq_len: int, identity: bool) -> Callable[[], Any]:
    function, arguments = _gradient(config, seq_len)
    replaced = (
        mock.patch("phase2_jax.memory.hebbian.hebbian_scan", _identity_hebbian),
        mock.patch("phase2_jax.memory.hebbian.delta_scan_with_values", _identity_delta),
        mock.patch("phase2_jax.model.resolvent_branch.resolvent_scan", _identity_resolvent),
    )
    if identity:
        with replaced[0], replaced[1], replaced[2]:
            compiled = jax.jit(function).lower(*arguments).compile()
    else:
        compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    del argv
    config = _model_config()
    lengths = [int(n) for n in _SEQ_LENS.value]
    runs = {(n, identity): _compiled(config, n, identity) for n in lengths for identity in (False, True)}
    times: dict[tuple[int, bool], list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(_ROUNDS.value):
        for key, run in runs.items():
            times[key].append(_timed(run))
    medians = {key: statistics.median(values) for key, values in times.items()}
    print(
        f"device {jax.devices()[0].device_kind}, B {_BATCH.value}, d {config.d_model}, {config.num_layers} layers, "
        f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}, {config.dtype}"
    )
    print(f"{'N':>8} {'ms/step':>10} {'tokens/s':>12} {'identity scans ms':>18} {'ratio':>7} {'min..max ms':>20}")
    for n in lengths:
        ms, plain, values = medians[n, False], medians[n, True], times[n, False]
        rate = _BATCH.value * n / ms * 1e3
        span = f"{min(values):.0f}..{max(values):.0f}"
        print(f"{n:>8} {ms:>10.1f} {rate:>12,.0f} {plain:>18.1f} {ms / plain:>7.2f} {span:>20}")
    if len(lengths) > 1:
        first, last = lengths[0], lengths[-1]
        print(
            f"N {first} -> {last}: {medians[last, False] / medians[first, False]:.2f} times the time "
            f"for {last / first:.0f} times the tokens"
        )
    elif not _CONFIG.value and lengths == [512] and _BATCH.value == 2:
        print(f"the original on 2 cores: {ORIGINAL_MS:.0f} ms, {ORIGINAL_MS / medians[512, False]:.1f} times as long")


if __name__ == "__main__":
    app.run(main)
