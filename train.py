"""Train a model: `python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.group.name=value …]`."""

from phase2_jax.interrupt import interruptible

if __name__ == "__main__":
    with interruptible():
        from absl import flags

        from phase2_jax.programs import train

        flags.adopt_module_key_flags(train)
        train.main()
