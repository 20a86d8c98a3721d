"""tinyshakespeare on the small budget: 0.80 million parameters, 2,000 steps of 12 x 64 characters, on a CPU.

    python train.py --config=configs/benchmarks/tinyshakespeare_small.py --workdir=runs/shakespeare_small \\
        --config.data.path=tinyshakespeare/input.txt

Seven minutes on one core. Expect 1.51 nats per character over the whole validation split (three seeds: 1.513 ± .005);
nanoGPT gives 1.88 at this budget, counting with a 6-gram 1.558.
"""

from ml_collections import ConfigDict

from phase2_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.head_dim = 32
    # Its parameters do more in the feed-forward branch here.
    config.model.output_gate = False
    config.model.ffn_dim = 432
    config.model.base_decay = 1e-3
    config.model.half_life_max = 256.0
    config.model.consolidation.interval = 0
    config.train.num_steps = 2_000
    config.train.steps_per_epoch = 1_000
    config.train.batch_size = 12
    config.train.seq_len = 64
    config.optimizer.name = "muon"
    config.optimizer.muon_by_head = True
    config.optimizer.learning_rate = 5e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.checkpoint.every_steps = 0
    return config
