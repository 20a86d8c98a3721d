"""Configuration of everything a run reports while it trains."""

from dataclasses import dataclass, field

from phase2_jax.errors import UserError


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, off unless asked for; an absent package or network is a warning, never a failure."""

    enabled: bool = False
    project: str = "phase2-training"
    name: str = ""
    """Name of the run; empty lets Weights & Biases choose one."""


@dataclass(frozen=True)
class LoggingConfig:
    """How often a run reports, and where to. The metrics and history files are always written."""

    console_every: int = 10
    """Batches of an epoch between two lines on screen."""
    tensorboard: bool = True
    """Write TensorBoard event files into ``workdir/tensorboard``."""
    batch_every: int = 5
    """Steps between two points of the ``batch/*`` and per-layer curves in TensorBoard and Weights & Biases."""
    sample_tokens: int = 128
    """Tokens of sample text written at each epoch for TensorBoard and Weights & Biases; 0 = none."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def validate(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: a cadence below 1, or Weights & Biases enabled without a project.
        """
        for name, value in (("console_every", self.console_every), ("batch_every", self.batch_every)):
            if value < 1:
                raise UserError(f"logging.{name} is {value}: it counts steps, give 1 or more")
        if self.sample_tokens < 0:
            raise UserError(f"logging.sample_tokens is {self.sample_tokens}: give 0 (no sample text) or more")
        if self.wandb.enabled and not self.wandb.project:
            raise UserError("logging.wandb.project is empty: name a project or set logging.wandb.enabled=False")
