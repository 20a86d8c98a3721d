"""The original's base preset: d 512, 6 layers, 8 heads of 64, sequences of 1,024.

    python train.py --config=configs/base.py --workdir=runs/base [--config.data.path=TEXT]

Variant `configs/base.py:original_init` adds the zeta position embedding and zeta initialisation.
"""

from ml_collections import ConfigDict

from phase2_jax.training.presets import apply_variant, original_preset


def get_config(variant: str = "") -> ConfigDict:
    config = original_preset(d_model=512, num_layers=6, num_heads=8, seq_len=1024)
    return apply_variant(config, variant)
