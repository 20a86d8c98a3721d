"""The harder mixture of associative recall: sequences of 64 to 256 tokens with 4 to 64 pairs among random tokens.

    python train.py --config=configs/benchmarks/mqar_mixture.py:2,128,128 --workdir=runs/mqar_mixture
    python benchmarks/task_accuracy.py --workdir=runs/mqar_mixture \
        --cells=64:4,64:8,64:16,128:32,256:64,512:128,1024:256

The variant is HEADS,K,V of the only layer, whose state is 4 HEADS K V bytes. Three and a half minutes on one H200.
Expect a mean accuracy of .997 over the seven cells with 2,128,128 (131 kB) and --config.train.num_steps=24000 (six and
a half minutes), .976 with 1,128,64 (33 kB) and .798 with 1,64,36 (9 kB); with 33 kB or more at least .9997 in the cells
as long as trained ones, .981 and .836 in the last (one seed each).
"""

from ml_collections import ConfigDict

from configs.benchmarks import mqar
from phase2_jax.errors import UserError


def get_config(variant: str = "2,128,128") -> ConfigDict:
    try:
        heads, key_width, value_width = map(int, variant.split(","))
    except ValueError as error:
        raise UserError(f"--config variant {variant!r} must be HEADS,K,V, for example 2,128,128") from error
    config = mqar.get_config("256,64,128")
    config.model.num_layers = 1
    config.model.num_heads = heads
    config.model.head_dim = key_width
    config.model.value_dim = value_width
    config.data.task.random_fillers = True
    config.data.task.num_train = 180_000
    config.data.task.mixture = "64:4:100000,128:8:20000,256:16:20000,256:32:20000,256:64:20000"
    config.train.num_steps = 12_000
    # With 0.1 a small memory learns less, and larger ones carry over less to more pairs than trained.
    config.optimizer.weight_decay = 1.0
    return config
