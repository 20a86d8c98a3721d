"""Operations of a model, and peaks of devices by the names that drivers give them."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.training.flops import SCAN_CHUNK, flops_per_token, peak_flops

MODEL = ModelConfig(vocab_size=50, d_model=32, num_layers=3, num_heads=2, head_dim=16, value_dim=8, resolvent=False)


def test_dense_layers_take_six_operations_a_weight():
    config = replace(MODEL, memory=False)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, seq_len=8, rngs=nnx.Rngs(0))), nnx.Param)
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)]
    # Those of the potential are left out, as they are small.
    used = sum(leaf.size for leaf in kernels if leaf.shape[-1] >= 8)
    assert flops_per_token(config) == 6 * used


def test_the_delta_rule_counts_its_overlaps_its_system_and_two_products_with_the_state():
    # A chunk of C tokens and head: C² K / 2 for overlaps of keys, C² (K + V) / 2 for the system, 2 C K V for the state.
    of_a_token = SCAN_CHUNK * 16 / 2 + SCAN_CHUNK * (16 + 8) / 2 + 2 * 16 * 8
    more = flops_per_token(replace(MODEL, plasticity="delta", eta=1.0)) - flops_per_token(MODEL)
    assert more == 3 * 2 * 6 * of_a_token


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H2000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device(device, peak):
    assert peak_flops(device) == peak
