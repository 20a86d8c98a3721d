"""What the configuration files of the original's sizes share."""

from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.training.config import default_config


def original_preset(*, d_model: int, num_layers: int, num_heads: int, seq_len: int) -> ConfigDict:
    """The original's sizes, optimizer (AdamW, lr 1e-4 → 1e-6) and dropout, with a memory that is alive.

    base_decay is the largest round number that still lets half-lives reach the sequence length.
    """
    config = default_config()
    config.model.d_model = d_model
    config.model.num_layers = num_layers
    config.model.num_heads = num_heads
    config.model.head_dim = 64
    config.model.dropout = 0.1
    config.model.base_decay = 1e-4
    config.train.seq_len = seq_len
    config.train.batch_size = 4
    config.train.num_epochs = 10
    return config


def apply_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """`config` itself, or with the original's initialisation when `variant` is "original_init".

    Raises:
      UserError: another variant.
    """
    if variant == "original_init":
        config.model.position_embedding = "zeta"
        config.model.zeta_init = True
    elif variant:
        raise UserError(f"--config variant {variant!r} does not exist: there is original_init")
    return config
