"""Everything a run needs before its first step: text, model, optimizer, compiled steps, initial state."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import hebbian_scan
from phase2_jax.data import pipeline
from phase2_jax.data.corpora import Corpus, TaskCorpus
from phase2_jax.errors import UserError
from phase2_jax.model.block import Block
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import BlockFactory, LanguageModel, ModelState, init_state
from phase2_jax.training.config import LARGEST_INTEGER, ExperimentConfig
from phase2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from phase2_jax.training.step import Batch, StepConfig, TrainState, compile_train_step, eval_step

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclass(frozen=True)
class Architecture:
    """Whose layers a run trains: those of this project, or others that are called alike.

    Attributes:
      name: stored with the run, so that nothing mistakes its checkpoints for another's.
      block: makes a layer.
    """

    name: str = "phase2"
    block: BlockFactory = Block


PHASE2 = Architecture()


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run.

    Attributes:
      config: the checked configuration.
      model_config: its model with the vocabulary filled in.
      corpus, corpus_fingerprint: the text, and what identifies it.
      steps_per_epoch, total_steps: lengths in optimizer steps.
      mesh: devices.
      graphdef: structure of the model.
      step_config: what train_step was made from.
      train_step: `(TrainState, Batch) -> (TrainState, metrics)`, donates its state.
      eval_step: `(params, memory, Batch) -> (sums, memory, Γ)`, donates nothing.
    """

    config: ExperimentConfig
    model_config: ModelConfig
    corpus: Corpus | TaskCorpus
    corpus_fingerprint: str
    steps_per_epoch: int
    total_steps: int
    mesh: Mesh
    graphdef: nnx.GraphDef[LanguageModel]
    step_config: StepConfig
    train_step: Any
    eval_step: Any
    state_shardings: TrainState

    def put_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """A host batch on the devices, its rows spread over the data axis."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def fresh_memory(self) -> ModelState:
        """Memory before the first token, spread like the batch."""
        shardings = self.state_shardings.memory
        return jax.jit(partial(init_state, self.model_config, self.config.train.batch_size), out_shardings=shardings)()


def resolve_model(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model's configuration with a vocabulary that holds the tokenizer's.

    Raises:
      UserError: `model.vocab_size` is smaller than the tokenizer's.
    """
    if 0 < config.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is smaller than the tokenizer's {vocab_size} tokens, "
            "so token ids would fall outside: leave it at 0"
        )
    return config if config.vocab_size else dataclasses.replace(config, vocab_size=vocab_size)


def available_devices() -> list[Any]:
    """The devices JAX uses.

    Raises:
      UserError: it can use none of those that the environment asks for.
    """
    try:
        return jax.devices()
    # jax asserts that a platform it was asked for has a client.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}): install the extra cuda13 or "
            "cuda12 for an NVIDIA GPU, or leave JAX_PLATFORMS unset or at cpu"
        ) from error


def make_mesh(config: ExperimentConfig) -> Mesh:
    """Mesh of all devices along `data`; one device is the mesh of size one.

    Raises:
      UserError: no device, more than there are, or a batch they cannot share.
    """
    devices = available_devices()
    available = len(devices)
    count = config.sharding.data or available
    if count > available:
        raise UserError(f"sharding.data={count} but there are {available} devices: lower it, or 0 for all")
    micro_batch = config.train.batch_size // config.train.grad_accum
    if micro_batch % count:
        raise UserError(
            f"train.batch_size={config.train.batch_size} in {config.train.grad_accum} micro-batches "
            f"cannot be shared by {count} devices: make the micro-batch a multiple, or set sharding.data"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((count, 1, 1, 1), MESH_AXES, axis_types=axis_types, devices=devices[:count])


def is_aligned(config: ExperimentConfig) -> bool:
    """Whether every batch starts at a stream position where a consolidation may fall."""
    interval = config.model.consolidation.interval
    return interval > 0 and config.train.seq_len % interval == 0


def unrolls(config: ExperimentConfig) -> bool:
    """Whether a training step compiles every layer by itself."""
    wanted = config.kernels.unroll_layers
    return wanted == "yes" if wanted else jax.default_backend() == "gpu"


def _check_implementation(name: str | None, config: ModelConfig) -> None:
    """Raise UserError where the Hebbian scan of the model cannot run so."""
    if name is None or not config.memory:
        return
    keys = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.head_dim), config.dtype)
    values = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.value_width), config.dtype)
    gates = jax.ShapeDtypeStruct((1, 1, config.num_heads), jnp.float32)
    try:
        jax.eval_shape(partial(hebbian_scan, implementation=name), keys, keys, values, gates, gates)
    except ValueError as error:
        raise UserError(f"kernels.implementation={name!r}: {error}; leave it empty for the default") from error


def build(
    config: ExperimentConfig,
    corpus: Corpus | TaskCorpus,
    schedule: optax.Schedule | None = None,
    architecture: Architecture = PHASE2,
) -> tuple[Run, TrainState]:
    """Compile-ready steps and the initial state of a run on `corpus`.

    Args:
      config: checked.
      corpus: text and tokenizer.
      schedule: of the learning rate, instead of warmup and cosine.
      architecture: of the model's layers.

    Raises:
      UserError: sizes that do not fit each other, the text or the devices.
    """
    train = config.train
    model_config = resolve_model(config.model, corpus.tokenizer.vocab_size)
    for stream in (corpus.train, corpus.valid):
        stream.check_vocabulary(model_config.vocab_size)
    # Found at the first validation otherwise, an epoch later.
    pipeline.check_scorable(corpus.valid)
    epoch = pipeline.steps_per_epoch(corpus.train, config.data, batch_size=train.batch_size, seq_len=train.seq_len)
    steps_per_epoch = train.steps_per_epoch or epoch
    total_steps = train.num_steps or train.num_epochs * steps_per_epoch
    if total_steps > LARGEST_INTEGER:
        raise UserError(
            f"train.num_epochs={train.num_epochs} epochs of {steps_per_epoch} steps are more than the "
            f"{LARGEST_INTEGER} that can be counted: lower it"
        )
    mesh = make_mesh(config)

    implementation = config.kernels.implementation or None
    _check_implementation(implementation, model_config)

    def initialise() -> tuple[LanguageModel, jax.Array]:
        params_key, run_key = jax.random.split(jax.random.key(train.seed))
        model = LanguageModel(
            model_config,
            seq_len=train.seq_len,
            rngs=nnx.Rngs(params=params_key),
            implementation=implementation,
            block=architecture.block,
        )
        return model, run_key

    schedule = schedule or learning_rate_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule, model_config)
    graphdef, _ = nnx.split(nnx.eval_shape(initialise)[0])

    def initial_state() -> TrainState:
        model, run_key = initialise()
        params = nnx.split(model)[1]
        return TrainState(
            params=params,
            opt_state=optimizer.init(params),
            memory=init_state(model_config, train.batch_size),
            rng=run_key,
            step=jnp.zeros((), jnp.int32),
            failed_step=jnp.zeros((), jnp.int32),
        )

    shardings = _state_shardings(mesh, jax.eval_shape(initial_state))
    state = jax.jit(initial_state, out_shardings=shardings)()
    step_config = StepConfig(
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=schedule,
        grad_accum=train.grad_accum,
        fresh_memory=None if config.data.carries_memory else partial(init_state, model_config, train.batch_size),
        aligned=is_aligned(config),
        unroll=unrolls(config),
    )
    run = Run(
        config=config,
        model_config=model_config,
        corpus=corpus,
        corpus_fingerprint=fingerprint(corpus),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        mesh=mesh,
        graphdef=graphdef,
        step_config=step_config,
        train_step=compile_train_step(step_config, shardings),
        eval_step=jax.jit(partial(eval_step, graphdef, is_aligned(config))),
        state_shardings=shardings,
    )
    return run, state


def _state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    replicated = NamedSharding(mesh, PartitionSpec())
    # Memory leaves are (layers, rows, ...); the stream position has no rows.
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    shardings = jax.tree.map(lambda _: replicated, state)
    memory = jax.tree.map(lambda leaf: rows if leaf.ndim > 1 else replicated, state.memory)
    return dataclasses.replace(shardings, memory=memory)


def fingerprint(corpus: Corpus | TaskCorpus) -> str:
    """sha256 over both splits and the tokenizer: the same text read the same way."""
    parts = (corpus.tokenizer.fingerprint().encode(), corpus.train.fingerprint(), corpus.valid.fingerprint())
    return hashlib.sha256(b"".join(parts)).hexdigest()
