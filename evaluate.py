"""Evaluate a model: `python evaluate.py --workdir=runs/tiny [--checkpoint=best|latest|STEP] [--data=TEXT] [--json]`."""

from phase2_jax.interrupt import interruptible

if __name__ == "__main__":
    with interruptible():
        from phase2_jax.programs.evaluate import main

        main()
