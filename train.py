"""Train a model: `python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.group.name=value …]`."""

from phase2_jax.programs.train import main

if __name__ == "__main__":
    main()
