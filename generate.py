"""Continue a text: `python generate.py --workdir=runs/tiny --prompt="To be" [--max_tokens=200]`."""

from phase2_jax.interrupt import interruptible

if __name__ == "__main__":
    with interruptible():
        from phase2_jax.programs.generate import main

        main()
