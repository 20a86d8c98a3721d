"""Every architectural choice of the model, validated."""

from dataclasses import dataclass, field

from phase2_jax.errors import UserError
from phase2_jax.memory.config import ConsolidationConfig, LyapunovConfig, MemoryConfig, ResonanceConfig, SnrConfig
from phase2_jax.physics import zeta


@dataclass(frozen=True)
class ModelConfig:
    """Architecture; each field may be set as `--config.model.NAME=VALUE`."""

    vocab_size: int = 0
    """Rows of the embedding; 0 = the tokenizer's vocabulary."""
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    """Width K of queries and keys."""
    value_dim: int = 0
    """Width V of values; 0 = head_dim."""
    ffn_dim: int = 0
    """Hidden width of the feed-forward branch; 0 = 4·d_model, -1 = no feed-forward branch."""
    dropout: float = 0.0
    """Of what each branch adds, and of the embedding."""
    token_dropout: float = 0.0
    """Share of input tokens whose embedding is zero, whole; the first of a row never is."""
    output_dropout: float = 0.0
    """Of what the head reads."""
    tie_embeddings: bool = False
    dtype: str = "float32"
    """Compute type of the matrix products, float32 or bfloat16; parameters, state and accumulators stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    base_decay: float = 1e-3
    """Floor of Γ: no half-life exceeds ln2 / (base_decay·dt)."""
    adaptive_decay: bool = True
    """Γ depends on the token; off = Γ is base_decay everywhere."""
    shared_potential: bool = False
    """One potential for all heads, as in the original."""
    dt: float = 1.0
    """Time between tokens."""
    half_life_min: float = 2.0
    """Shortest half-life at initialisation, in tokens."""
    half_life_max: float = 0.0
    """Longest half-life at initialisation; 0 = train.seq_len. Capped at half of what base_decay allows."""

    resolvent: bool = True
    """The BK resolvent branch."""
    resolvent_gamma: str = "shared"
    """shared: the memory's Γ in the Hamiltonian; own: a Γ of its own; none: a Hermitian Hamiltonian."""
    bk_mode: str = "causal"
    """causal, or bidirectional (sees the future: encoders only)."""
    encoder: bool = False
    """The model is not a causal language model, so it may look ahead."""
    epsilon_min: float = 1e-2
    """Least distance ε of the energy z = E + iε from the real axis."""

    memory: bool = True
    """The Hebbian memory branch."""
    plasticity: str = "hebbian"
    """hebbian: η_t k_t v_tᵀ is written; delta: v_t less what the memory already answers to k_t takes the place of v_t.
    Corrects errors where old values have to be replaced; wants model.eta=1."""
    eta: float = 0.1
    """Write strength η, with plasticity=delta the share of the error that is corrected; 0 switches writing off."""
    conv_width: int = 4
    """Taps of the causal convolution on q, k, v; 1 = none."""
    key_norm: bool = True
    """L2-normalise queries and keys."""
    key_power: int = 0
    """Raise the positive components of queries and keys to this power, so that unlike ones hardly overlap; 0 leaves
    them as they are."""
    eta_gate: bool = True
    """η_t = η·sigmoid(w·x_t) instead of η."""
    readout_norm: bool = True
    """RMSNorm on each head's readout."""
    readout_floor: float = 0.0
    """Where the learned floor of that root mean square starts, one a head: a weaker answer stays weak. 0 = none."""
    output_gate: bool = True
    """SiLU gate on the readout."""
    memory_feedback: bool = True
    """The memory of a layer shifts the potential of the next."""

    position_embedding: str = "none"
    """none, or zeta (sin/cos of the zeta zeros)."""
    zeta_init: bool = False
    """Projections start with singular values ∝ 1/ζ_i (Frobenius norm of the standard initialiser)."""

    consolidation: ConsolidationConfig = field(default_factory=ConsolidationConfig)
    snr: SnrConfig = field(default_factory=SnrConfig)
    resonance: ResonanceConfig = field(default_factory=ResonanceConfig)
    lyapunov: LyapunovConfig = field(default_factory=LyapunovConfig)

    @property
    def value_width(self) -> int:
        """V of every head."""
        return self.value_dim or self.head_dim

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward branch, 0 when there is none."""
        return {0: 4 * self.d_model, -1: 0}.get(self.ffn_dim, self.ffn_dim)

    @property
    def num_potentials(self) -> int:
        """Potentials per layer: one a head, or one for all."""
        return 1 if self.shared_potential else self.num_heads

    @property
    def memory_config(self) -> MemoryConfig:
        """How the fast weights are written and what acts on them between the writes."""
        return MemoryConfig(self.consolidation, self.snr, self.resonance, self.lyapunov, self.plasticity)

    def _validate_zeta(self) -> None:
        """Raise UserError where something wants more zeros of the zeta function than the table holds."""
        widest = zeta.TABLE_SIZE
        # The figures of resonance need its basis also when the mechanism is off.
        if self.memory:
            _require(self.head_dim <= widest, "model.head_dim", self.head_dim, f"at most {widest} (resonance)")
        if self.position_embedding == "zeta":
            _require(
                self.d_model <= 2 * widest, "model.d_model", self.d_model, f"at most {2 * widest} (zeta embedding)"
            )
        if self.zeta_init:
            # Every projection has one side of this width.
            _require(self.d_model <= widest, "model.d_model", self.d_model, f"at most {widest} with zeta_init")

    def _validate_plasticity(self) -> None:
        """Raise UserError where correcting errors could make them grow: I − η k kᵀ must not."""
        _choice("model.plasticity", self.plasticity, ("hebbian", "delta"))
        if self.plasticity == "delta" and not self.key_norm:
            raise UserError(
                "model.key_norm=False lets model.plasticity=delta diverge on long keys: "
                "use model.key_norm=True, or model.plasticity=hebbian"
            )
        if self.plasticity == "delta":
            _require(self.eta <= 1, "model.eta", self.eta, "at most 1 with model.plasticity=delta (all of the error)")

    def validate(self) -> None:
        """Raise UserError that names the first field out of range and what it may be."""
        for name in ("d_model", "num_layers", "num_heads", "head_dim", "conv_width"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("vocab_size", "value_dim", "key_power"):
            _require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "an integer of at least 0")
        _require(self.ffn_dim >= -1, "model.ffn_dim", self.ffn_dim, "a width, 0 for 4·d_model or -1 for none")
        for name in ("dropout", "token_dropout", "output_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")
        for name in ("base_decay", "dt", "half_life_min", "epsilon_min"):
            _require(0 < getattr(self, name) < float("inf"), f"model.{name}", getattr(self, name), "greater than 0")
        _require(
            1e-2 <= self.epsilon_min < 0.5,
            "model.epsilon_min",
            self.epsilon_min,
            "at least 0.01 (bounds the resolvent) and below 0.5 (ε starts between twice that and 1)",
        )
        _require(
            self.half_life_max == 0 or self.half_life_max >= self.half_life_min,
            "model.half_life_max",
            self.half_life_max,
            "0 or at least half_life_min",
        )
        _require(0 <= self.eta < float("inf"), "model.eta", self.eta, "at least 0 (0 switches writing off)")
        _require(0 <= self.readout_floor < float("inf"), "model.readout_floor", self.readout_floor, "at least 0")
        if self.readout_floor and not self.readout_norm:
            raise UserError(
                f"model.readout_floor={self.readout_floor} is of the norm that model.readout_norm=False leaves out: "
                "use 0, or model.readout_norm=True"
            )
        _require(
            self.consolidation.interval >= 0,
            "model.consolidation.interval",
            self.consolidation.interval,
            "at least 0 (0 = never)",
        )
        _require(
            0 <= self.snr.threshold < float("inf"), "model.snr.threshold", self.snr.threshold, "at least 0 and finite"
        )
        _require(
            1 <= self.snr.gamma_boost < float("inf"),
            "model.snr.gamma_boost",
            self.snr.gamma_boost,
            "at least 1 and finite",
        )
        _require(
            1 <= self.snr.eta_boost < float("inf"), "model.snr.eta_boost", self.snr.eta_boost, "at least 1 and finite"
        )
        _require(0 <= self.resonance.threshold <= 1, "model.resonance.threshold", self.resonance.threshold, "in [0, 1]")
        _require(
            1 <= self.lyapunov.gamma_boost < float("inf"),
            "model.lyapunov.gamma_boost",
            self.lyapunov.gamma_boost,
            "at least 1 and finite",
        )
        _choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        _choice("model.resolvent_gamma", self.resolvent_gamma, ("shared", "own", "none"))
        _choice("model.bk_mode", self.bk_mode, ("causal", "bidirectional"))
        _choice("model.position_embedding", self.position_embedding, ("none", "zeta"))
        if self.bk_mode == "bidirectional" and not self.encoder:
            raise UserError(
                "model.bk_mode=bidirectional lets a language model see the token it must predict: "
                "use causal, or model.encoder=True"
            )
        if self.position_embedding == "zeta" and self.d_model % 2:
            raise UserError(f"model.d_model={self.d_model} must be even for model.position_embedding=zeta")
        self._validate_zeta()
        self._validate_plasticity()
        needed = self.base_decay * self.dt * self.half_life_min
        if self.adaptive_decay and needed >= 0.34:
            raise UserError(
                f"model.base_decay={self.base_decay} caps half-lives below model.half_life_min={self.half_life_min}: "
                f"use less than {0.34 / (self.dt * self.half_life_min):.3g}"
            )


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"{name}={value} must be {wanted}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, name, repr(value), "one of " + ", ".join(repr(a) for a in allowed))
