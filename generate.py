"""Continue a text: `python generate.py --workdir=runs/tiny --prompt="To be" [--max_tokens=200]`."""

from phase2_jax.programs.generate import main

if __name__ == "__main__":
    main()
