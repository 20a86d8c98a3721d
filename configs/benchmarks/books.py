"""Books, byte by byte: the base preset, 5,000 steps of 32,768 bytes.

    python train.py --config=configs/benchmarks/books.py --workdir=runs/books \
        --config.data.path=books/train_90M.txt.xz --config.data.valid_path=books/valid.txt

The variant is the length of a training sequence; a step keeps its 32,768 bytes. Not trained yet.
"""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.presets import original_preset

TOKENS_PER_STEP = 32_768


def get_config(variant: str = "1024") -> ConfigDict:
    if not variant.isdecimal() or int(variant) < 1 or TOKENS_PER_STEP % int(variant):
        raise UserError(f"--config variant {variant!r} must be a length that divides {TOKENS_PER_STEP}")
    length = int(variant)
    config = original_preset(d_model=512, num_layers=6, num_heads=8, seq_len=length)
    config.model.dtype = "bfloat16"
    config.model.dropout = 0.0
    config.train.batch_size = TOKENS_PER_STEP // length
    config.train.num_steps = 5_000
    config.train.steps_per_epoch = 1_000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 5e-5
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.checkpoint.every_steps = 0
    return config
