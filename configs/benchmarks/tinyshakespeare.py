"""tinyshakespeare on the GPU budget: 5.7 of at most 10.7 million parameters, at most 2,600 of 5,000 steps of 64 x 256.

    python train.py --config=configs/benchmarks/tinyshakespeare.py --workdir=runs/shakespeare \
        --config.data.path=tinyshakespeare/input.txt

A minute and a half on an H200. Expect 1.430 nats per character over the whole validation split (three seeds: 1.430 ±
.009), at step 1,820 or 2,080; the run stops when two validations have been no better. More parameters or dropped
characters make it worse: the million characters are what limits it. Sharpened keys and much weight decay help.
"""

from ml_collections import ConfigDict

from phase2_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 256
    config.model.num_layers = 6
    config.model.num_heads = 4
    config.model.head_dim = 64
    config.model.key_power = 2
    config.model.dtype = "bfloat16"
    config.model.output_gate = False
    config.model.ffn_dim = 1280
    config.model.dropout = 0.3
    config.model.output_dropout = 0.2
    config.model.base_decay = 1e-4
    config.model.half_life_max = 1024.0
    # Hardly a character is seen twice after the same past.
    config.data.random_start = True
    config.data.fresh_state_fraction = 1.0
    config.train.num_steps = 2_600
    config.train.steps_per_epoch = 260
    config.train.early_stopping.patience = 2
    config.train.batch_size = 64
    config.train.seq_len = 256
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 1.0
    config.checkpoint.every_steps = 0
    return config
