"""Which parameters Muon moves, and how."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from phase2_jax.errors import UserError
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.training.config import OptimizerConfig
from phase2_jax.training.optimizer import MUON_RMS, make_optimizer, muon_labels

CONFIG = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0, gradient_clip_norm=0.0)
MODEL = ModelConfig(vocab_size=7, d_model=8, num_layers=2, num_heads=2, head_dim=4, value_dim=6, ffn_dim=12)


@pytest.fixture(scope="module")
def params():
    return nnx.split(LanguageModel(MODEL, seq_len=16, rngs=nnx.Rngs(params=0)))[1]


def updates_of(config, params):
    optimizer = make_optimizer(config, lambda step: config.learning_rate, MODEL)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    grads = structure.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def named(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_muon_takes_the_matrices_of_the_layers_alone(params):
    muon = {name for name, label in named(muon_labels(params)).items() if label == "muon"}
    assert {"qkv", "out", "up", "down"} <= {word for name in muon for word in name.split("'")}
    assert all("blocks" in name and "kernel" in name for name in muon)
    assert not any("taps" in name or "scale" in name for name in muon)


def test_updates_of_each_layer_are_orthogonal_and_of_one_size(params):
    updates = named(updates_of(CONFIG, params))
    (name,) = (name for name in updates if "'up'" in name and "kernel" in name)
    for update_DxF in updates[name]:
        singular = np.linalg.svd(update_DxF, compute_uv=False)
        # Five Newton-Schulz steps leave singular values between about 0.7 and 1.2 of their mean.
        assert singular.max() / singular.min() < 2
        # 8 equal singular values s give entries of root mean square s / sqrt(12) = 0.2 lr.
        np.testing.assert_allclose(np.sqrt(np.mean(update_DxF**2)), MUON_RMS * CONFIG.learning_rate, rtol=0.3)


def test_by_head_the_update_of_every_head_is_orthogonal(params):
    whole, by_head = (named(updates_of(config, params)) for config in (CONFIG, replace(CONFIG, muon_by_head=True)))
    (name,) = (name for name in whole if "'qkv'" in name)
    spread = {"whole": [], "by head": []}
    for kind, updates in (("whole", whole), ("by head", by_head)):
        for update_DxC in updates[name]:
            # Two heads of four queries, as many of keys, and two of six values.
            parts = np.split(update_DxC, (4, 8, 12, 16, 22), axis=1)
            assert [part.shape[1] for part in parts] == [4, 4, 4, 4, 6, 6]
            for part in parts:
                singular = np.linalg.svd(part, compute_uv=False)
                spread[kind].append(singular.max() / singular.min())
                if kind == "by head":
                    np.testing.assert_allclose(np.sqrt(np.mean(part**2)), MUON_RMS * CONFIG.learning_rate, rtol=0.3)
    # Both bounds as in the test of whole matrices: what five Newton-Schulz steps leave.
    assert max(spread["by head"]) < 2 < max(spread["whole"])
    for other in set(whole) - {name}:
        np.testing.assert_array_equal(by_head[other], whole[other])


def test_the_rest_moves_as_under_adamw(params):
    muon, adamw = (named(updates_of(config, params)) for config in (CONFIG, replace(CONFIG, name="adamw")))
    labels = dict(zip(muon, jax.tree.leaves(muon_labels(params)), strict=True))
    for name, label in labels.items():
        if label == "adamw":
            np.testing.assert_allclose(muon[name], adamw[name], rtol=1e-6)
        else:
            assert np.abs(muon[name] - adamw[name]).max() > 1e-4


def test_heads_apart_want_muon():
    with pytest.raises(UserError, match=r"^optimizer\.muon_by_head=True [^\n]*optimizer\.name=muon$"):
        replace(CONFIG, name="adamw", muon_by_head=True).validate()


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.name='sgd'"):
        OptimizerConfig(name="sgd").validate()
