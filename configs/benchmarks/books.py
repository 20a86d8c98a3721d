"""Books, byte by byte: one pass over the 90 MB of training text, contexts of 2,048 to 32,768 bytes.

    python train.py --config=configs/benchmarks/books.py:2048 --workdir=runs/books \
        --config.data.path=books/train_90M.txt.xz --config.data.valid_path=books/valid.txt
    python benchmarks/baselines/train.py --baseline=transformer --config=configs/benchmarks/books.py:2048 \
        --workdir=runs/books_transformer --config.model.resolvent=False --config.model.ffn_dim=2336 \
        --config.model.num_heads=8 --config.model.head_dim=64 --config.optimizer.learning_rate=4e-3 \
        --config.data.path=books/train_90M.txt.xz --config.data.valid_path=books/valid.txt
    … --baseline=gla … --config.model.ffn_dim=2064 --config.model.value_dim=64

The variant is the length of a training sequence; a step keeps its 32,768 bytes. 27.8 million parameters each; 123.9
with `,125m` behind the length (the Transformer then with 12 heads and --config.model.ffn_dim=5160, gla with 4760).
Windows are shuffled; validation carries the memory over. Six minutes on one H200 that other runs share (the Transformer
two alone), eight beyond 2,048. Expect 1.433 ± .005 bits per byte at 2,048 (three seeds), the Transformer 1.465 ± .002,
gla 1.524 ± .004; 1.422 ± .006 at 8,192 (three seeds) and 1.460 at 32,768 (two), where the Transformer has 1.431 and
1.500; with 123.9 million parameters 1.389 and 1.429 (one seed each).
"""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.config import default_config

TOKENS_PER_STEP = 32_768


def get_config(variant: str = "2048") -> ConfigDict:
    number, _, size = variant.partition(",")
    if not number.isdecimal() or int(number) < 1 or TOKENS_PER_STEP % int(number) or size not in ("", "125m"):
        raise UserError(
            f"--config variant {variant!r} must be a length that divides {TOKENS_PER_STEP}, or LENGTH,125m for the "
            "larger model"
        )
    length = int(number)
    config = default_config()
    config.model.d_model = 512
    config.model.num_layers = 8
    config.model.num_heads = 4
    config.model.head_dim = 256
    config.model.value_dim = 128
    config.model.output_gate = False
    config.model.memory_feedback = False
    config.model.readout_floor = 0.05
    config.model.ffn_dim = 1803
    # Long contexts gain more from a wider memory than from a wider feed-forward branch.
    if length > 2_048 and not size:
        config.model.value_dim = 256
        config.model.ffn_dim = 1289
    if size:
        config.model.d_model = 768
        config.model.num_layers = 12
        config.model.num_heads = 6
        config.model.ffn_dim = 4367
    config.model.dtype = "bfloat16"
    config.model.base_decay = 1e-5
    config.model.half_life_max = 32_768.0
    config.model.consolidation.interval = 0
    config.data.mode = "windows"
    config.train.seq_len = length
    config.train.batch_size = TOKENS_PER_STEP // length
    config.train.num_steps = 2_746
    config.train.steps_per_epoch = 1_373
    config.optimizer.name = "muon"
    config.optimizer.muon_by_head = True
    # A step that sees a single book wants less.
    config.optimizer.learning_rate = 6e-3 if length < TOKENS_PER_STEP else 4e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.6
    config.checkpoint.every_steps = 0
    config.logging.sample_tokens = 0
    return config
