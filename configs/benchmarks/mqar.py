"""Multi-query associative recall, the grid of Zoology's figure 2: two layers without feed-forward branch or resolvent.

    python train.py --config=configs/benchmarks/mqar.py:512,64,128 --workdir=runs/mqar

The variant is LENGTH,PAIRS,WIDTH. Two to five minutes on one H200 beside other runs. Expect an accuracy of 1.000 (three
seeds a cell, the first of the easier ones with heads of 64; 256,16,64 has .9992 with one of them). Keys of 64 overlap
too much to tell 64 pairs apart (.995). Above 256 tokens every batch is new.
"""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.config import default_config


def get_config(variant: str = "512,64,128") -> ConfigDict:
    try:
        length, pairs, width = map(int, variant.split(","))
    except ValueError as error:
        raise UserError(f"--config variant {variant!r} must be LENGTH,PAIRS,WIDTH, for example 512,64,128") from error
    config = default_config()
    config.model.d_model = width
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.head_dim = 128
    config.model.ffn_dim = -1
    config.model.dtype = "bfloat16"
    config.model.resolvent = False
    config.model.base_decay = 1e-9
    config.model.half_life_max = 4.0 * length
    config.model.consolidation.interval = 0
    config.data.mode = "windows"
    config.data.task.name = "mqar"
    config.data.task.vocab_size = 8192
    config.data.task.num_items = pairs
    config.data.task.num_train = 100_000 if length <= 256 else 0
    config.data.task.num_valid = 3_000
    config.train.seq_len = length
    config.train.batch_size = 65_536 // length if length > 128 else 512
    config.train.num_steps = 8_000
    config.train.steps_per_epoch = 1_000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.1
    return config
