"""The model's pieces that no stream shows: encoders, tied embeddings, types, transformations, figures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import ConsolidationConfig, ResonanceConfig, SnrConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state


@pytest.fixture(scope="module")
def one_branch(config):
    """A layer with the resolvent alone: quick to compile."""
    return replace(config, num_layers=1, memory=False, ffn_dim=-1)


def test_an_encoder_sees_both_sides(one_branch, make_compiled, tokens):
    encoder = make_compiled(replace(one_branch, bk_mode="bidirectional", encoder=True))
    other = tokens.copy()
    other[:, -1] = (other[:, -1] + 1) % 11
    assert np.all(np.any(encoder(tokens)[0][:, :-1] != encoder(other)[0][:, :-1], axis=(1, 2)))


def test_permission_to_look_ahead_is_no_look_ahead(one_branch, make_compiled, tokens):
    plain, permitted = make_compiled(one_branch), make_compiled(replace(one_branch, encoder=True))
    np.testing.assert_array_equal(plain(tokens)[0], permitted(tokens)[0])


def test_dropout_only_while_training(one_branch, make_compiled, tokens):
    plain, dropping = make_compiled(one_branch), make_compiled(replace(one_branch, dropout=0.5))
    np.testing.assert_array_equal(plain(tokens)[0], dropping(tokens)[0])


def test_rematerialisation_saves_memory_and_nothing_else(config, loss_of, tokens):
    config = replace(config, memory=False, resolvent=False)

    def loss_of_model(config):
        graphdef, params = nnx.split(LanguageModel(config, seq_len=12, rngs=nnx.Rngs(0)))

        def loss(params):
            return loss_of(nnx.merge(graphdef, params)(tokens, init_state(config, 2))[0], tokens)

        return loss, params

    (plain, params), (remat, _) = loss_of_model(config), loss_of_model(replace(config, remat=True))
    kept = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p, f=f: jax.vjp(f, p)[1], params)))
        for f in (plain, remat)
    ]
    assert kept[1] < 0.8 * kept[0]
    jax.tree.map(
        # The same operations in programs that fuse them differently.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.jit(jax.grad(plain))(params),
        jax.jit(jax.grad(remat))(params),
    )


def test_the_backward_pass_keeps_few_arrays_of_each_size():
    layers, batch, num_tokens, width, heads, key_width, value_width, interval = 2, 3, 20, 48, 2, 4, 8, 5
    config = ModelConfig(
        vocab_size=11,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        head_dim=key_width,
        value_dim=value_width,
        dtype="bfloat16",
        consolidation=ConsolidationConfig(interval),
    )
    graphdef, params = nnx.split(LanguageModel(config, seq_len=num_tokens, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((batch, num_tokens), jnp.int32)

    def run(params):
        return nnx.merge(graphdef, params)(tokens, init_state(config, batch), aligned=True)[0]

    leaves = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(run, params)[1], params))
    wide = [leaf.shape for leaf in leaves if leaf.dtype == jnp.float32]
    # What the potential reads; norms would keep three more each.
    assert wide.count((layers, batch, num_tokens, width)) <= 2
    # W where an interval begins and where it ends; consolidation would keep a dozen.
    assert wide.count((layers, num_tokens // interval, batch, heads, key_width, value_width)) <= 2
    # Keys, readouts and products of the feedback, as layers or intervals stack them: not in float32.
    for stacked in ((batch, num_tokens), (num_tokens // interval, batch, interval)):
        assert not any((layers, *stacked, heads, n) in wide for n in (key_width, value_width))
    # The readout, its gate and what the last product reads; SiLU would keep more.
    narrow = [leaf.shape for leaf in leaves if leaf.dtype == jnp.bfloat16]
    assert narrow.count((layers, batch, num_tokens, heads * value_width)) <= 3


def test_tied_embeddings(one_branch, make_compiled, tokens):
    tied = make_compiled(replace(one_branch, tie_embeddings=True))
    assert "head" in make_compiled(one_branch).params
    assert "head" not in tied.params
    # A row of the table that no token reads moves its own logit and no other.
    unused = next(i for i in range(11) if i not in tokens[0])
    before = tied(tokens)[0]
    table = tied.params["embedding"]["embedding"]
    tied.params["embedding"]["embedding"] = table.replace(table[...].at[unused].add(1.0))
    moved = np.any(tied(tokens)[0][0] != before[0], axis=0)
    np.testing.assert_array_equal(np.flatnonzero(moved), [unused])


def test_bfloat16_is_for_products_only(compiled, compiled_bfloat16, tokens):
    tokens = tokens[:, :8]
    logits, state, _ = compiled_bfloat16(tokens)
    assert logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(compiled_bfloat16.params)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32), np.dtype(np.int32)}
    reference = compiled(tokens)[0]
    # bfloat16 keeps 8 bits: 0.4 % a product, some ten products deep.
    assert 1e-4 < np.max(np.abs(logits - reference)) < 0.1 * np.max(np.abs(reference))


@pytest.mark.slow
def test_seeds_side_by_side(compiled, tokens):
    """Parameters of several seeds stacked, as for an ensemble: vmap of the whole model."""
    config, tokens = compiled.config, tokens[:, :8]
    models = [LanguageModel(config, seq_len=12, rngs=nnx.Rngs(seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(nnx.split(model)[1] for model in models))
    start, reset = init_state(config, 2), np.zeros(tokens.shape, bool)

    def forward(params):
        return nnx.merge(compiled.graphdef, params)(tokens, start, reset_BxN=reset, aligned=True)[:2]

    logits, states = jax.jit(jax.vmap(forward))(stacked)
    assert np.max(np.abs(logits[0] - logits[1])) > 0.1
    for seed in range(2):
        params, state = jax.tree.map(lambda x, seed=seed: x[seed], (stacked, states))
        alone, alone_state, _ = compiled.forward(params, tokens, start, reset, False)
        # Two programs in float32; logits are of size 1.
        np.testing.assert_allclose(logits[seed], alone, atol=2e-5)
        np.testing.assert_allclose(state.w_BxHxKxV, alone_state.w_BxHxKxV, atol=2e-5)


def test_tree_mode_of_flax(config, tokens):
    """Modules hold no shared references, so that Flax's coming tree mode builds and runs the same model."""

    def build_and_trace():
        graphdef, params = nnx.split(LanguageModel(config, seq_len=12, rngs=nnx.Rngs(0)))
        forward = lambda params: nnx.merge(graphdef, params)(tokens, init_state(config, 2))  # noqa: E731
        return params, jax.eval_shape(forward, params)

    params, outputs = build_and_trace()
    with nnx.set_graph_mode(False):
        tree_params, tree_outputs = build_and_trace()
    assert jax.tree.leaves(outputs) == jax.tree.leaves(tree_outputs)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(params), jax.tree.leaves(tree_params))


def test_figures_with_the_mechanisms_off(config, make_compiled, tokens):
    off = replace(
        config,
        num_layers=1,
        resolvent=False,
        ffn_dim=-1,
        consolidation=ConsolidationConfig(0),
        snr=SnrConfig(enabled=False),
        resonance=ResonanceConfig(enabled=False),
    )
    _, state, diagnostics = make_compiled(off)(tokens)
    layers, w_BxHxKxV = diagnostics.layers, state.w_BxHxKxV[0]
    snr_BxH, low_BxH = snr.statistics(w_BxHxKxV, 0.5)
    modes_BxH, mode_energy_BxH = resonance.statistics(w_BxHxKxV, 0.1)
    expected = {"snr_mean": snr_BxH, "snr_low_ratio": low_BxH, "resonant_modes": modes_BxH}
    for name, value in (expected | {"resonance_energy": mode_energy_BxH}).items():
        np.testing.assert_allclose(getattr(layers, name), [np.mean(value)], rtol=1e-4, err_msg=name)
        assert np.all(np.mean(value) > 0), name
    # A fresh memory only fills, and more of it cancels than adds up.
    assert layers.stable_ratio[0] == 0
    assert layers.energy_change[0] == pytest.approx(float(layers.energy[0]), rel=1e-5)
    assert 0 < layers.coherence[0] < 1
    assert diagnostics.gamma_LxBxNxP.shape == (1, 2, 12, 2)
    assert layers.gamma_min[0] <= layers.gamma_mean[0] <= layers.gamma_max[0]
