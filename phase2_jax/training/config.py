"""The whole configuration of a run: frozen dataclasses here are the one place of every default and every check.

`default_config` turns them into an `ml_collections.ConfigDict` for the command line, `from_config_dict` turns that
back, checked.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from ml_collections import ConfigDict

from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.model.config import ModelConfig
from phase2_jax.training.logging_config import LoggingConfig

OPTIMIZERS = ("adamw", "muon")
IMPLEMENTATIONS = ("", "naive", "xla", "mosaic", "triton")
UNROLL = ("", "yes", "no")
# Counts are int32 on the devices, and a larger seed of the weights would be taken modulo 2^32.
LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class OptimizerConfig:
    """Warmup, cosine decay over the whole run and clipping by global norm."""

    name: str = "adamw"
    """adamw, or muon: matrices of the layers by orthogonalised momentum, the rest by AdamW."""
    muon_by_head: bool = False
    """Muon orthogonalises the queries, keys and values of each head apart, instead of all in one matrix. Better where
    text is plentiful."""
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    """Where the cosine ends."""
    warmup_steps: int = 100
    """Steps of linear warmup, at most a tenth of the run."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    """On matrices only: not on norms, biases, convolution taps or per-head scalars."""
    gradient_clip_norm: float = 1.0
    """0 = no clipping."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        for name in ("learning_rate", "epsilon"):
            _require(0 < getattr(self, name) < float("inf"), f"optimizer.{name}", getattr(self, name), "greater than 0")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            "optimizer.min_learning_rate",
            self.min_learning_rate,
            "between 0 and learning_rate",
        )
        _require(self.name in OPTIMIZERS, "optimizer.name", repr(self.name), f"one of {OPTIMIZERS}")
        if self.muon_by_head and self.name != "muon":
            raise UserError(
                f"optimizer.muon_by_head=True does nothing with optimizer.name={self.name!r}: "
                "use optimizer.muon_by_head=False, or optimizer.name=muon"
            )
        for name in ("warmup_steps", "weight_decay", "gradient_clip_norm"):
            _require(0 <= getattr(self, name) < float("inf"), f"optimizer.{name}", getattr(self, name), "at least 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Ends a run that has stopped learning."""

    patience: int = 0
    """Epochs that may pass without a better validation loss; 0 = never stop early."""
    min_delta: float = 0.0
    """What counts as better: lower by more than this, in nats per token."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        _require(self.patience >= 0, "train.early_stopping.patience", self.patience, "at least 0 (0 = never)")
        _require(0 <= self.min_delta < float("inf"), "train.early_stopping.min_delta", self.min_delta, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the training."""

    num_epochs: int = 10
    steps_per_epoch: int = 0
    """Steps between two validations; 0 = the whole text once."""
    num_steps: int = 0
    """Length of the run in steps; 0 = num_epochs epochs."""
    num_val_batches: int = 0
    """Validation batches; 0 = the whole validation set."""
    batch_size: int = 4
    seq_len: int = 512
    grad_accum: int = 1
    """Micro-batches a step is split into; the result is that of the whole batch."""
    seed: int = 0
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    profile_steps: str = ""
    """FIRST:LAST, steps (from 1) that are traced into workdir/profile; empty = none."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        for name in ("num_epochs", "batch_size", "seq_len", "grad_accum"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("steps_per_epoch", "num_steps", "num_val_batches", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "an integer of at least 0")
        if self.batch_size % self.grad_accum:
            raise UserError(f"train.grad_accum={self.grad_accum} must divide train.batch_size={self.batch_size}")
        self.early_stopping.validate()
        first, colon, last = self.profile_steps.partition(":")
        numbers = first.isdecimal() and last.isdecimal()
        _require(
            not self.profile_steps or (bool(colon) and numbers and 1 <= int(first) <= int(last)),
            "train.profile_steps",
            repr(self.profile_steps),
            "FIRST:LAST, steps counted from 1, for example 10:15",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written."""

    every_steps: int = 200
    """Steps between checkpoints, so that a kill loses little; 0 = only at epochs."""
    every_epochs: int = 5
    """Epochs between checkpoints; the end of the run and a new best always get one."""
    keep: int = 3
    """Step checkpoints kept, besides the best one."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        _require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "at least 0 (0 = only at epochs)")
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", self.every_epochs, "at least 1")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class ShardingConfig:
    """Devices along each axis of the mesh."""

    data: int = 0
    """Devices the batch is spread over; 0 = all there are."""
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def validate(self) -> None:
        """Raise UserError for a negative count and for the axes that are not there yet."""
        _require(self.data >= 0, "sharding.data", self.data, "at least 0 (0 = all devices)")
        for name in ("fsdp", "sequence", "tensor"):
            _require(
                getattr(self, name) == 1,
                f"sharding.{name}",
                getattr(self, name),
                "1: only the data axis is implemented, use sharding.data",
            )


@dataclass(frozen=True)
class KernelsConfig:
    """How a step is computed, not what."""

    implementation: str = ""
    """Of the scans: "" = the default; naive, xla, or on NVIDIA GPUs triton, and mosaic for the Hebbian scan."""
    unroll_layers: str = ""
    """Whether every layer is compiled by itself: faster steps (nothing is copied from layer to layer) that take longer
    to compile and somewhat more memory. yes, no, "" = on GPUs."""

    def validate(self) -> None:
        """Raise UserError for a name that does not exist."""
        for name, known in (("implementation", IMPLEMENTATIONS), ("unroll_layers", UNROLL)):
            _require(getattr(self, name) in known, f"kernels.{name}", repr(getattr(self, name)), f"one of {known}")


@dataclass(frozen=True)
class ExperimentConfig:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def validate(self) -> None:
        """Check every group.

        Raises:
          UserError: names the first value out of range and what it may be.
        """
        for group in dataclasses.fields(self):
            getattr(self, group.name).validate()
        _check_integers(self, "")


def default_config() -> ConfigDict:
    """Every field with its default, as a locked `ConfigDict`."""
    return ConfigDict(dataclasses.asdict(ExperimentConfig())).lock()


def from_config_dict(config: ConfigDict) -> ExperimentConfig:
    """The checked configuration.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range.
    """
    experiment = _build(ExperimentConfig, config.to_dict(), "")
    experiment.validate()
    return experiment


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"config.{prefix}{unknown[0]} does not exist{did_you_mean(unknown[0], hints)}")
    arguments = {}
    for name, value in values.items():
        wanted = hints[name]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise UserError(f"config.{prefix}{name}={value!r} must be a group of settings")
            arguments[name] = _build(wanted, value, f"{prefix}{name}.")
        else:
            arguments[name] = _convert(value, wanted, f"{prefix}{name}")
    return cls(**arguments)


def _convert(value: Any, wanted: type, name: str) -> Any:
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"config.{name}={value!r} must be of type {wanted.__name__}")
    return value


def _check_integers(group: Any, prefix: str) -> None:
    for field_ in dataclasses.fields(group):
        name, value = prefix + field_.name, getattr(group, field_.name)
        if dataclasses.is_dataclass(value):
            _check_integers(value, f"{name}.")
        # Of the host's chance alone, and checked there.
        elif type(value) is int and name != "data.task.seed":
            _require(value <= LARGEST_INTEGER, name, value, f"at most {LARGEST_INTEGER}")


def did_you_mean(name: str, known: Any) -> str:
    """ " (did you mean X?)" for the closest known name, or the names there are."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(sorted(known))}"


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"{name}={value} must be {wanted}")
