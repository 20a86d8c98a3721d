"""Long training in bfloat16: the base preset, 5,000 steps of 32,768 bytes of books, with AdamW.

    python train.py --config=configs/benchmarks/stability.py --workdir=runs/stability \
        --config.data.path=books/train_90M.txt.xz --config.data.valid_path=books/valid.txt

Seven minutes on one H200. Expect a validation loss of 1.093 nats a byte, no spike that lasts, and an energy of the
memory that levels off (one seed).
"""

from ml_collections import ConfigDict

from phase2_jax.training.presets import original_preset


def get_config() -> ConfigDict:
    config = original_preset(d_model=512, num_layers=6, num_heads=8, seq_len=1024)
    config.model.dtype = "bfloat16"
    config.model.dropout = 0.0
    config.train.batch_size = 32
    config.train.num_steps = 5_000
    config.train.steps_per_epoch = 1_000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 5e-5
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.checkpoint.every_steps = 0
    return config
