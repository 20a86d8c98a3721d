"""Speed and memory of a real run on one GPU: 200 steps of 16 x 2,048 bytes in bfloat16.

    python train.py --config=configs/benchmarks/throughput.py:base --workdir=runs/base_kernels \
        --config.data.path=books/train_90M.txt.xz
    python train.py --config=configs/benchmarks/throughput.py:base --workdir=runs/base_xla \
        --config.data.path=books/train_90M.txt.xz --config.kernels.implementation=xla
    python -m phase2_jax.reporting runs/base_kernels runs/base_xla
    XLA_FLAGS=--xla_gpu_enable_command_buffer= python train.py --config=configs/benchmarks/throughput.py:base \
        --workdir=runs/base_trace --config.train.num_steps=40 --config.train.profile_steps=30:32
    python benchmarks/trace_shares.py --workdir=runs/base_trace

On one H200 two minutes each (125m with xla four), most of them compilation: 1,010,000 tokens/s (base; xla 626,000),
300,000 (125m; xla 207,000), see docs/performance.md.
Traces are runs of their own, without CUDA graphs: with them jax 0.11.2 ended a run of 125m by a segmentation fault in
the first step after its trace.

Any text does as data.path; without one it is the text the package ships. Variants are `base`, the base preset with
20,933,872 parameters, and `125m`: twelve layers of d 768 with 125,116,880, of which the feed-forward branch has what
words would take as embeddings. Each step's tokens/s, MFU and peak memory are in `metrics.jsonl`; the report draws the
loss curves of both runs over each other.
"""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.presets import original_preset

SIZES = {
    "base": {"d_model": 512, "num_layers": 6, "num_heads": 8},
    "125m": {"d_model": 768, "num_layers": 12, "num_heads": 12},
}


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in SIZES:
        raise UserError(f"--config variant {variant!r} does not exist: there are {', '.join(SIZES)}")
    config = original_preset(**SIZES[variant], seq_len=2048)
    config.model.dtype = "bfloat16"
    config.model.dropout = 0.0
    config.train.batch_size = 16
    config.train.num_steps = 200
    config.train.steps_per_epoch = 100
    config.train.num_val_batches = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.checkpoint.every_steps = 0
    config.logging.sample_tokens = 0
    if variant == "125m":
        config.model.ffn_dim = 4800
        config.optimizer.learning_rate = 6e-4
    return config
