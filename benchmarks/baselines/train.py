"""Train another architecture with everything of ours around it: data, model skeleton, optimizer, trainer.

    python benchmarks/baselines/train.py --baseline=transformer --config=configs/benchmarks/tinyshakespeare_small.py \\
        --workdir=runs/transformer --config.model.resolvent=False --config.model.ffn_dim=453

--baseline: transformer (rotary positions, attention within a window of train.seq_len, also across the documents in it)
or gla (gated linear attention, carried state, K of --config.model.head_dim and V of --config.model.value_dim).
model.ffn_dim is there to make the numbers of parameters equal, as the table at the start shows. The same model with its
memory off, or with a fixed Γ, needs no other program: `python train.py` with `--config.model.memory=False` or
`--config.model.adaptive_decay=False`.
"""

import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.baselines.blocks import MIXERS, BaselineBlock
from phase2_jax.interrupt import interruptible
from phase2_jax.programs import train
from phase2_jax.training.setup import Architecture

_BASELINE = flags.DEFINE_enum("baseline", "transformer", sorted(MIXERS), "Architecture of the layers.")


def _architecture() -> Architecture:
    name = _BASELINE.value
    return Architecture(name, lambda config, seq_len, implementation, rngs: BaselineBlock(name, config, rngs))


if __name__ == "__main__":
    flags.adopt_module_key_flags(train)
    with interruptible():
        train.main(_architecture)
