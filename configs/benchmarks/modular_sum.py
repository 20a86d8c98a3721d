"""Running sums modulo the variant (2: parity) of random digits, trained on 40 of them, asked on more.

python train.py --config=configs/benchmarks/modular_sum.py:2 --workdir=runs/parity
python benchmarks/task_accuracy.py --workdir=runs/parity --cells=40,80,160,640 --examples=200

Five minutes on two cores. After 2,000 of the 4,000 steps the resolvent alone (--config.model.memory=False
--config.model.resolvent_gamma=own) had .65 of the parities of 40 bits right and .51 of those of 640 (one seed).
"""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.config import default_config


def get_config(variant: str = "2") -> ConfigDict:
    if not variant.isdecimal() or int(variant) < 2:
        raise UserError(f"--config variant {variant!r} must be a modulus of at least 2")
    config = default_config()
    config.model.d_model = 64
    config.model.num_layers = 2
    config.model.num_heads = 8
    config.model.head_dim = 8
    config.model.ffn_dim = 128
    config.model.base_decay = 1e-9
    config.model.consolidation.interval = 0
    config.data.mode = "windows"
    config.data.task.name = "modular_sum"
    config.data.task.vocab_size = int(variant)
    config.data.task.num_valid = 512
    config.train.seq_len = 40
    config.train.batch_size = 64
    config.train.num_steps = 4_000
    config.train.steps_per_epoch = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 0
    return config
