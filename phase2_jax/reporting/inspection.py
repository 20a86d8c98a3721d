"""A look inside a checkpoint: what its memory does token by token, and what it holds after reading a passage."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import delta_scan_with_values
from phase2_jax.data.corpora import TokenStream, encode_documents
from phase2_jax.data.tokenizers import Tokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference.loading import LATEST, load_model
from phase2_jax.memory import resonance, snr
from phase2_jax.memory.hebbian import Writes
from phase2_jax.memory.state import MemoryState
from phase2_jax.memory.stream import scan_stream
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.reporting.run_files import RunFiles
from phase2_jax.training.checkpoints import BEST

READ_TOKENS = 1024
"""At least so many tokens are read (fewer if the text is shorter), so that the memory is full when it is looked at."""
SHOWN_TOKENS = 320


@dataclass(frozen=True)
class Inspection:
    """What a model's memory did while it read T tokens, the last N of which are shown as text. All float32 or float64.

    Attributes:
      checkpoint: which one, in words.
      dt: time between tokens.
      gamma_LxTxP: forgetting rate Γ of every token and potential.
      pieces: the text of each of the N tokens.
      first: position of the first of them among the T.
      eta_LxN: write strength η of each token, mean over heads.
      readout_LxN: ‖Wᵀq‖, the size of what the memory answers, mean over heads.
      source_LxN: how many tokens back the most recalled token lies; 0 = none of the document so far.
      share_LxN: its share of all that is recalled, in [0, 1].
      loss_N: −log p of each token given those before, in nats; NaN for the first of the text.
      context: the text of up to 12 tokens around each source, `[L][N]`.
      key_directions_LxH, query_directions_LxH: in how many of its K dimensions the T keys and queries of a head vary.
      snr_LxHxKxV: |W| / σ after the last token.
      energies_LxHxK, mask_LxHxK: energies of the resonance modes then, and the weights that the next consolidation
        would give them.
    """

    checkpoint: str
    dt: float
    gamma_LxTxP: np.ndarray
    pieces: list[str]
    first: int
    eta_LxN: np.ndarray
    readout_LxN: np.ndarray
    source_LxN: np.ndarray
    share_LxN: np.ndarray
    loss_N: np.ndarray
    context: list[list[str]]
    key_directions_LxH: np.ndarray
    query_directions_LxH: np.ndarray
    snr_LxHxKxV: np.ndarray
    energies_LxHxK: np.ndarray
    mask_LxHxK: np.ndarray


def inspect(run: RunFiles, passage: str | None = None) -> Inspection:
    """Read a passage with the best checkpoint of a run, or its newest when it has no best one.

    Args:
      run: its folder and configuration.
      passage: the text to read; None takes the beginning of the run's validation text.

    Raises:
      UserError: whatever is missing for that; the message says what.
    """
    wanted, words = (BEST, "best") if any((run.workdir / BEST).glob("[0-9]*")) else (LATEST, "newest")
    loaded = load_model(run.workdir, wanted, causal=False)
    config, tokenizer = loaded.model_config, loaded.tokenizer
    if not config.memory:
        raise UserError("this model has no memory (model.memory=False)")
    text = loaded.validation_text("--passage") if passage is None else encode_documents(tokenizer, [passage])
    tokens_T, reset_T = _stretch(text, config, loaded.config.train.seq_len)
    shown = min(SHOWN_TOKENS, tokens_T.size)
    model = nnx.merge(loaded.graphdef(), loaded.params)
    traces = jax.device_get(_trace(config, model, tokens_T, reset_T, shown))
    pieces = _pieces(tokenizer, tokens_T)
    first = tokens_T.size - shown
    sources_LxN = traces["source_LxN"]
    positions_N = first + np.arange(shown)
    w_LxHxKxV = jnp.asarray(traces["w_LxHxKxV"])
    energies_squared_LxHxK = resonance.mode_energies_squared(w_LxHxKxV)
    return Inspection(
        checkpoint=f"{words} checkpoint, step {loaded.step:,}",
        dt=config.dt,
        gamma_LxTxP=traces["gamma_LxTxP"],
        pieces=pieces[first:],
        first=first,
        eta_LxN=traces["eta_LxN"],
        readout_LxN=traces["readout_LxN"],
        source_LxN=np.where(sources_LxN < 0, 0, positions_N - sources_LxN),
        share_LxN=traces["share_LxN"],
        loss_N=traces["loss_N"],
        context=[[_context(pieces, int(source)) for source in row] for row in sources_LxN],
        key_directions_LxH=traces["key_directions_LxH"],
        query_directions_LxH=traces["query_directions_LxH"],
        snr_LxHxKxV=np.asarray(snr.snr_ratio(w_LxHxKxV)),
        energies_LxHxK=np.asarray(jnp.sqrt(energies_squared_LxHxK)),
        mask_LxHxK=np.asarray(resonance.mode_weights(energies_squared_LxHxK, config.resonance.threshold)),
    )


def _stretch(text: TokenStream, config: ModelConfig, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of a text and where documents begin in them.

    The stretch ends just before a consolidation, which would hide the weak modes that it removes.
    """
    length = min(len(text), max(READ_TOKENS, 2 * seq_len))
    interval = config.consolidation.interval
    if 0 < interval < length:
        length = length // interval * interval - 1
    return text.tokens[:length], text.is_document_start(np.arange(length))


def _trace(
    config: ModelConfig, model: LanguageModel, tokens_T: np.ndarray, reset_T: np.ndarray, shown: int
) -> dict[str, jax.Array]:
    """Run the model over the tokens and follow what each layer's memory is asked and answers."""
    tokens_1xT, reset_1xT = jnp.asarray(tokens_T[None]), jnp.asarray(reset_T[None])
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params)
        logits_1xTxV, _, diagnostics = model(
            tokens_1xT, init_state(config, 1), reset_BxN=reset_1xT, aligned=True, trace=True
        )
        log_p_TxV = jax.nn.log_softmax(logits_1xTxV[0])
        loss_T = -jnp.take_along_axis(log_p_TxV[:-1], tokens_1xT[0, 1:, None], axis=-1)[:, 0]
        assert diagnostics.gamma_LxBxNxP is not None
        return _follow_memory(config, model, tokens_1xT, reset_1xT, shown) | {
            "gamma_LxTxP": diagnostics.gamma_LxBxNxP[:, 0],
            "loss_N": jnp.append(jnp.nan, loss_T)[-shown:],
        }

    return run(params)


def _follow_memory(
    config: ModelConfig, model: LanguageModel, tokens_1xT: jax.Array, reset_1xT: jax.Array, shown: int
) -> dict[str, jax.Array]:
    """Write strengths, readouts and most recalled tokens of the last `shown` tokens in every layer, and the final W.

    A block does not show its queries and keys, so they are computed once more from the block's own parts.
    """
    graphdef, params = nnx.split(model.blocks)

    def layer(carry, xs):
        x_1xTxD, feedback_1xT = carry
        layer_params, feedback_KxV, state = xs
        block = nnx.merge(graphdef, layer_params)
        assert block.memory is not None
        assert block.norm2 is not None
        v_1xTxP, gamma_1xTxP, resolvent_gamma_1xTxP = block.potential(block.norm1(x_1xTxD), feedback_1xT)
        into_memory = x_1xTxD
        if block.resolvent is not None:
            into_memory = x_1xTxD + block.resolvent(v_1xTxP, resolvent_gamma_1xTxP, state, reset_1xT)[0]
        writes, before = block.memory.writes(block.norm2(into_memory), gamma_1xTxP, state, reset_1xT)
        y_1xTxHxV, _, after = scan_stream(writes, before, feedback_KxV, config.memory_config, aligned=True)
        written = _written(writes, before, config.plasticity)
        source_N, share_N = _most_recalled(jax.tree.map(lambda a: a[0], written), shown)
        seen = {
            "eta_LxN": jnp.mean(writes.eta_BxNxH[0, -shown:], axis=-1),
            "readout_LxN": jnp.mean(jnp.linalg.norm(y_1xTxHxV[0, -shown:].astype(jnp.float32), axis=-1), axis=-1),
            "source_LxN": source_N,
            "share_LxN": share_N,
            "key_directions_LxH": directions(writes.k_BxNxHxK[0]),
            "query_directions_LxH": directions(writes.q_BxNxHxK[0]),
            "w_LxHxKxV": after.w_BxHxKxV[0],
        }
        x_1xTxD, feedback_1xT, *_ = block(
            x_1xTxD,
            feedback_1xT,
            feedback_KxV,
            state,
            reset_1xT,
            aligned=True,
            deterministic=True,
            rngs=None,
        )
        return (x_1xTxD, feedback_1xT), seen

    start = (model.embed(tokens_1xT, jnp.zeros((), jnp.int32)), jnp.zeros(tokens_1xT.shape, jnp.float32))
    return jax.lax.scan(layer, start, (params, model.feedback_matrices(), init_state(config, 1)))[1]


def directions(keys_TxHxK: jax.Array) -> jax.Array:
    """Participation ratio (Σ σ²)² / Σ σ⁴ of the singular values σ of each head's keys, `(H,)` float32: 1 where all are
    parallel, n where they are spread evenly over n orthogonal directions.
    """
    keys_TxHxK = keys_TxHxK.astype(jnp.float32)
    gram_HxKxK = jnp.einsum("thk,thl->hkl", keys_TxHxK, keys_TxHxK)
    squares_H = jnp.trace(gram_HxKxK, axis1=1, axis2=2)
    return jnp.square(squares_H) / jnp.maximum(jnp.sum(jnp.square(gram_HxKxK), axis=(1, 2)), 1e-30)


def _written(writes: Writes, before: MemoryState, plasticity: str) -> Writes:
    """The writes with the values that the memory stores, consolidation left out."""
    if plasticity != "delta":
        return writes
    arguments = (writes.q_BxNxHxK, writes.k_BxNxHxK, writes.v_BxNxHxV, writes.log_decay_BxNxH, writes.eta_BxNxH)
    *_, u_BxNxHxV = delta_scan_with_values(*arguments, before.w_BxHxKxV, reset=writes.reset_BxN)
    return replace(writes, v_BxNxHxV=u_BxNxHxV)


def _most_recalled(writes: Any, shown: int) -> tuple[jax.Array, jax.Array]:
    """The earlier token that adds most to each readout, and its share; −1 where the document has none.

    Token s adds e^{−Σ Γ dt} η_s (q_t·k_s) v_s to y_t; its size is summed over the heads. What consolidation
    does in between is left out. `writes` has no batch axis.
    """
    sum_TxH = jnp.cumsum(writes.log_decay_BxNxH, axis=0)
    document_T = jnp.cumsum(writes.reset_BxN)
    num_tokens = document_T.size
    now_N = jnp.arange(num_tokens - shown, num_tokens)
    same_NxT = document_T[now_N][:, None] == document_T[None]
    until_NxT = same_NxT & (jnp.arange(num_tokens)[None] <= now_N[:, None])
    v_TxH = jnp.linalg.norm(writes.v_BxNxHxV.astype(jnp.float32), axis=-1)

    def add_head(total_NxT: jax.Array, head) -> tuple[jax.Array, None]:
        q_TxK, k_TxK, sum_T, weight_T = head
        scores_NxT = jnp.abs(jnp.einsum("nk,tk->nt", q_TxK[-shown:], k_TxK, preferred_element_type=jnp.float32))
        log_decay_NxT = jnp.minimum(sum_T[now_N][:, None] - sum_T[None], 0)
        size_NxT = jnp.exp(log_decay_NxT) * scores_NxT * weight_T[None]
        return total_NxT + jnp.where(until_NxT, size_NxT, 0), None

    heads = (
        jnp.moveaxis(writes.q_BxNxHxK, 1, 0),
        jnp.moveaxis(writes.k_BxNxHxK, 1, 0),
        sum_TxH.T,
        (writes.eta_BxNxH * v_TxH).T,
    )
    total_NxT, _ = jax.lax.scan(add_head, jnp.zeros(until_NxT.shape, jnp.float32), heads)
    earlier_NxT = jnp.where(jnp.arange(num_tokens)[None] < now_N[:, None], total_NxT, 0)
    source_N = jnp.argmax(earlier_NxT, axis=1)
    most_N = jnp.max(earlier_NxT, axis=1)
    share_N = most_N / jnp.maximum(jnp.sum(total_NxT, axis=1), 1e-30)
    return jnp.where(most_N > 0, source_N, -1), share_N


def _pieces(tokenizer: Tokenizer, tokens_T: np.ndarray) -> list[str]:
    """The text each token adds; a character spread over several tokens belongs to its last."""
    pieces: list[str] = []
    begun = 0
    for end in range(1, tokens_T.size + 1):
        # A few tokens of context are enough for tokenizers whose spaces depend on the neighbours.
        before, after = (tokenizer.decode(tokens_T[max(0, begun - 8) : stop]) for stop in (begun, end))
        piece = after[len(before) :] if after.startswith(before) else tokenizer.decode(tokens_T[begun:end])
        if "\ufffd" in piece and end - begun < 4 and end < tokens_T.size:
            pieces.append("")
            continue
        pieces.append(piece)
        begun = end
    return pieces


def _context(pieces: list[str], source: int) -> str:
    if source < 0:
        return ""
    before, after = "".join(pieces[max(0, source - 8) : source]), "".join(pieces[source + 1 : source + 5])
    return f"{before}⟦{pieces[source]}⟧{after}"


def half_lives(gamma: np.ndarray, dt: float) -> np.ndarray:
    """ln2 / (Γ·dt) in tokens, same shape."""
    return math.log(2.0) / (np.asarray(gamma, np.float64) * dt)
