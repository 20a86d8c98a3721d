"""A sample of what the model writes, logged with every epoch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.data.corpora import Corpus
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.training.step import Params

PROMPT_TOKENS = 32
TEMPERATURE = 0.8


def make_sampler(
    graphdef: nnx.GraphDef[LanguageModel], config: ModelConfig, corpus: Corpus, num_tokens: int
) -> Callable[[Params, int], tuple[str, str]]:
    """A function of parameters and a seed that returns (prompt, continuation).

    The prompt is the beginning of the validation text, the continuation `num_tokens` sampled tokens. An encoder, which
    sees ahead, has nothing to continue with; ask for none.
    """
    prompt_N = np.asarray(corpus.valid.tokens[:PROMPT_TOKENS])

    @jax.jit
    def continuation(params: Params, seed: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def pick(logits_1xNxV: jax.Array, key: jax.Array) -> jax.Array:
            logits_V = logits_1xNxV[0, -1, : corpus.tokenizer.vocab_size]
            return jax.random.categorical(key, logits_V / TEMPERATURE).astype(jnp.int32)

        def write(carry, key: jax.Array):
            token, state = carry
            logits_1x1xV, state, _ = model(token[None, None], state)
            return (pick(logits_1x1xV, key), state), token

        first, *rest = jax.random.split(jax.random.key(seed), num_tokens + 1)
        logits_1xNxV, state, _ = model(jnp.asarray(prompt_N[None]), init_state(config, 1))
        return jax.lax.scan(write, (pick(logits_1xNxV, first), state), jnp.stack(rest))[1]

    def sample(params: Params, seed: int) -> tuple[str, str]:
        tokens = jax.device_get(continuation(params, jnp.uint32(seed)))
        return corpus.tokenizer.decode(prompt_N), corpus.tokenizer.decode(tokens)

    return sample
