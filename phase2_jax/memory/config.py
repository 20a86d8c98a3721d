"""Settings of the writes into the fast weights, and of what happens to them in between."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SnrConfig:
    """SNR selection (`phase2_jax.memory.snr`)."""

    enabled: bool = True
    threshold: float = 0.5
    """A component with |W|/σ below this counts as noise."""
    gamma_boost: float = 2.0
    """How many times faster noise decays."""
    eta_boost: float = 1.5
    """Factor on the next interval's writes when every component stands out."""


@dataclass(frozen=True)
class ResonanceConfig:
    """Memory resonance (`phase2_jax.memory.resonance`)."""

    enabled: bool = True
    threshold: float = 0.1
    """Share of the strongest mode's energy below which a mode fades out."""


@dataclass(frozen=True)
class LyapunovConfig:
    """Homeostasis on top of the Lyapunov monitor (`phase2_jax.physics.lyapunov`); the monitor itself is always on."""

    control: bool = False
    """Raise Γ of unstable heads in the next interval."""
    gamma_boost: float = 1.5
    """Factor on Γ of an unstable head."""


@dataclass(frozen=True)
class ConsolidationConfig:
    """When a memory is consolidated."""

    interval: int = 256
    """Tokens of the stream between consolidations; 0 = never."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is written into the fast weights, and everything that acts on them between the writes."""

    consolidation: ConsolidationConfig = field(default_factory=ConsolidationConfig)
    snr: SnrConfig = field(default_factory=SnrConfig)
    resonance: ResonanceConfig = field(default_factory=ResonanceConfig)
    lyapunov: LyapunovConfig = field(default_factory=LyapunovConfig)
    plasticity: str = "hebbian"
    """hebbian: the value itself is written; delta: what the memory's answer to the key lacks of it."""
