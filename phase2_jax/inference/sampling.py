"""The next token from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phase2_jax.errors import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """How text is continued. The filters apply in the order of their fields, after the repetition penalty."""

    max_tokens: int = 200
    temperature: float = 0.8
    """Divides the logits; 0 = always the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens (and what ties with the last of them); 0 = all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; 1 = all."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest; 0 = all."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and of the text written so far: positive logits are divided by it, negative multiplied."""
    seed: int | None = None
    """None = another text every time."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "at least 0")
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "at least 0 and finite")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 = all tokens)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        penalty = self.repetition_penalty
        _require(0 < penalty < float("inf"), "repetition_penalty", penalty, "greater than 0 and finite")
        _require(self.seed is None or 0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        _require(all(self.stop), "stop", repr(self.stop), "free of empty strings")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """The filters that are on, as arrays: a compiled program serves every value. None = off, no time is spent on it."""

    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None


def make_filters(config: GenerationConfig) -> Filters:
    """The filters of a checked configuration. Without temperature only the repetition penalty is left to matter."""
    sampled = config.temperature > 0
    on = lambda value, wanted: jnp.float32(value) if wanted else None  # noqa: E731
    return Filters(
        # By less, quotients overflow, and no two logits could tell the difference.
        temperature=on(max(config.temperature, 1e-30), sampled),
        top_k=jnp.int32(min(config.top_k, 2**31 - 1)) if sampled and config.top_k else None,
        top_p=on(config.top_p, sampled and config.top_p < 1),
        min_p=on(config.min_p, sampled and config.min_p > 0),
        repetition_penalty=on(config.repetition_penalty, config.repetition_penalty != 1),
    )


def filter_logits(logits_V: jax.Array, seen_V: jax.Array, filters: Filters) -> jax.Array:
    """Logits of the distribution to draw from, −inf for tokens that are out; `seen_V` are those the penalty acts on."""
    if filters.repetition_penalty is not None:
        penalty = filters.repetition_penalty
        punished_V = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V = jnp.where(seen_V, punished_V, logits_V)
    if filters.temperature is not None:
        logits_V = logits_V / filters.temperature
    if filters.top_k is not None or filters.top_p is not None:
        logits_V = jnp.where(logits_V >= _threshold(logits_V, filters), logits_V, -jnp.inf)
    if filters.min_p is not None:
        logits_V = jnp.where(logits_V >= jnp.max(logits_V) + jnp.log(filters.min_p), logits_V, -jnp.inf)
    return logits_V


def _threshold(logits_V: jax.Array, filters: Filters) -> jax.Array:
    """The least logit that top-k and then top-p leave; one sort serves both."""
    descending_V = jnp.sort(logits_V, descending=True)
    rank_V = jnp.arange(descending_V.shape[0])
    if filters.top_k is not None:
        descending_V = jnp.where(rank_V < filters.top_k, descending_V, -jnp.inf)
    if filters.top_p is not None:
        probability_V = jax.nn.softmax(descending_V)
        before_V = jnp.cumsum(probability_V) - probability_V
        # Rank 0 stays whatever rounding does to a tiny top_p.
        descending_V = jnp.where((before_V < filters.top_p) | (rank_V == 0), descending_V, -jnp.inf)
    return jnp.min(jnp.where(descending_V > -jnp.inf, descending_V, jnp.inf))


def choose_token(logits_V: jax.Array, seen_V: jax.Array, key: jax.Array, filters: Filters) -> jax.Array:
    """An int32 token id, drawn with `key`, or the likeliest one without a temperature."""
    logits_V = filter_logits(logits_V, seen_V, filters)
    if filters.temperature is None:
        return jnp.argmax(logits_V).astype(jnp.int32)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"--{name}={value} must be {wanted}")
