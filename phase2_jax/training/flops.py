"""Arithmetic of a step, for model FLOPs utilisation (MFU)."""

import re

from phase2_jax.model.config import ModelConfig

# Dense bf16 peaks of the vendors' datasheets, FLOP/s; MFU is reported for these devices only.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
}
SCAN_CHUNK = 64


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of forward and backward for one token, `config.vocab_size` set.

    Two operations per weight of every dense product, twice that again for the backward pass, plus the chunked scan
    (4·C·D + 4·D² forward and 10·C·D + 10·D² backward per head for K = V = D, general widths likewise). Recomputation
    is not counted. Corrections of the delta rule are: overlaps of the keys, a system of C equations solved for keys and
    values, and two products with the state, which together take about as much again as the scan.
    """
    d, h, k, v = config.d_model, config.num_heads, config.head_dim, config.value_width
    weights = config.d_model * config.vocab_size
    per_layer = 2 * d * config.ffn_width
    scan = 0
    if config.memory:
        per_layer += d * h * (2 * k + v) + h * v * d * (2 if config.output_gate else 1)
        scan = h * 14 * (SCAN_CHUNK * (k + v) / 2 + k * v)
        if config.plasticity == "delta":
            scan += h * 6 * (SCAN_CHUNK * (2 * k + v) / 2 + 2 * k * v)
    if config.resolvent:
        per_layer += 2 * config.num_potentials * d
    return 6.0 * (weights + config.num_layers * per_layer) + config.num_layers * scan


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, None where it is not in the table: the longest entry that is whole words of its name."""
    fitting = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", device_kind)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None
