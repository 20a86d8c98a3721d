"""Induction heads: trained on 256 tokens, asked on up to 2^20.

    python train.py --config=configs/benchmarks/induction.py --workdir=runs/induction
    python benchmarks/task_accuracy.py --workdir=runs/induction --cells=64,256,1024,4096,16384,65536,262144,1048576

After 5,000 steps (eight minutes on one CPU core) every answer is right up to 65,536 tokens, 256 times the training
length, with seeds 0 and 2, and up to 4,096 with seed 1, which learns late. Sharpened keys do that, since what other
tokens write hardly overlaps with the question. Weight decay is to keep the logits small enough for the loss to see what
still does.

With --config.model.plasticity=delta --config.model.eta=1 --config.train.num_steps=15000
--config.optimizer.weight_decay=0.2 (half an hour) it is right at every length up to 1,048,576 with each of four seeds.
"""

from ml_collections import ConfigDict

from phase2_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 64
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.head_dim = 32
    config.model.ffn_dim = -1
    config.model.resolvent = False
    config.model.base_decay = 1e-9
    config.model.half_life_max = 2.0**22
    config.model.key_power = 2
    config.model.consolidation.interval = 0
    config.data.mode = "windows"
    config.data.task.name = "induction"
    config.data.task.vocab_size = 16
    config.data.task.num_valid = 1024
    config.train.seq_len = 256
    config.train.batch_size = 8
    config.train.num_steps = 5_000
    config.train.steps_per_epoch = 1_000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.weight_decay = 0.5
    config.checkpoint.every_steps = 0
    return config
