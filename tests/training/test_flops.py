"""Peaks of devices by the names that drivers give them."""

import pytest

from phase2_jax.training.flops import peak_flops


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
