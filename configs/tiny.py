"""Smallest model that learns something: four layers on the shipped text, byte by byte.

python train.py --config=configs/tiny.py --workdir=runs/tiny

Three epochs (1,926 steps, 1.97 million bytes) take five and a half minutes on two idle cores. Expect a validation loss
of 1.48 nats a byte (seed 0: 1.478 to 1.483 where only rounding differs); counting reaches 2.00 with a 3-gram, 1.53 with
a 6-gram (1.51 modified).
"""

from ml_collections import ConfigDict

from phase2_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.head_dim = 32
    config.model.ffn_dim = 384
    config.model.base_decay = 1e-3
    config.model.consolidation.interval = 64
    config.train.num_epochs = 3
    config.train.batch_size = 8
    config.train.seq_len = 128
    config.data.fresh_state_fraction = 0.02
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.1
    return config
