"""Selective copying: 16 tokens scattered over 4,096, to be repeated in their order.

    python train.py --config=configs/benchmarks/selective_copying.py --workdir=runs/selective_copying

Seventeen minutes on one H200 that six other runs share. Expect every one of the 8,192 tokens of the validation set
right from step 8,000 on, .998 at step 5,000 and .9993 at 7,500 (one seed). Half-lives start between a quarter of the
length and four times it, and the resolvent is on.
"""

from ml_collections import ConfigDict

from configs.benchmarks import induction


def get_config() -> ConfigDict:
    config = induction.get_config()
    config.model.num_heads = 4
    config.model.dtype = "bfloat16"
    config.model.resolvent = True
    config.model.half_life_min = 1024.0
    config.model.half_life_max = 4.0 * 4096
    config.model.key_power = 0
    config.data.task.name = "selective_copying"
    config.data.task.num_items = 16
    config.data.task.num_valid = 512
    config.train.seq_len = 4096
    config.train.batch_size = 64
    config.train.num_steps = 10_000
    config.train.steps_per_epoch = 500
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.0
    return config
