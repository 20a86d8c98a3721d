"""The original's small preset: d 256, 4 layers, 4 heads of 64, sequences of 512.

    python train.py --config=configs/small.py --workdir=runs/small [--config.data.path=TEXT]

Variant `configs/small.py:original_init` adds the zeta position embedding and zeta initialisation.
"""

from ml_collections import ConfigDict

from phase2_jax.training.presets import apply_variant, original_preset


def get_config(variant: str = "") -> ConfigDict:
    config = original_preset(d_model=256, num_layers=4, num_heads=4, seq_len=512)
    return apply_variant(config, variant)
