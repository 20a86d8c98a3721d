"""Computes phase2_jax/physics/zeta_zeros.npy and the note of its provenance beside it.

2,048 zeros take about half an hour on one core.

usage: python tools/make_zeta_table.py [NUMBER_OF_ZEROS]
"""

import sys
from pathlib import Path

import mpmath
import numpy as np

DESTINATION = Path(__file__).parents[1] / "phase2_jax" / "physics" / "zeta_zeros.npy"
DIGITS = 25
PROVENANCE = """\
zeta_zeros.npy: imaginary parts of the first {count} zeros of the Riemann zeta function on the critical line, in order,
float64, from {first} to {last}. Computed by tools/make_zeta_table.py with mpmath.zetazero
(mpmath {version}) at {digits} significant digits, each then rounded to the nearest float64.
"""


def write(zeros: np.ndarray) -> None:
    """Save the table and its provenance."""
    np.save(DESTINATION, zeros)
    note = PROVENANCE.format(
        count=len(zeros),
        version=mpmath.__version__,
        digits=DIGITS,
        first=repr(float(zeros[0])),
        last=repr(float(zeros[-1])),
    )
    DESTINATION.with_suffix(".txt").write_text(note)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    mpmath.mp.dps = DIGITS
    write(np.array([float(mpmath.zetazero(n).imag) for n in range(1, count + 1)], np.float64))


if __name__ == "__main__":
    main()
