"""Evaluate a model: `python evaluate.py --workdir=runs/tiny [--checkpoint=best|latest|STEP] [--data=TEXT] [--json]`."""

from phase2_jax.programs.evaluate import main

if __name__ == "__main__":
    main()
