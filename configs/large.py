"""The original's large preset: d 1024, 12 layers, 16 heads of 64, sequences of 2,048.

    python train.py --config=configs/large.py --workdir=runs/large [--config.data.path=TEXT]

Variant `configs/large.py:original_init` adds the zeta position embedding and zeta initialisation.
"""

from ml_collections import ConfigDict

from phase2_jax.training.presets import apply_variant, original_preset


def get_config(variant: str = "") -> ConfigDict:
    config = original_preset(d_model=1024, num_layers=12, num_heads=16, seq_len=2048)
    return apply_variant(config, variant)
