"""Linear-time scans of the model: dissipative Hebbian memory and the resolvent of a tridiagonal Hamiltonian.

Each operation has a folder with the law written plainly (naive), a chunked form for any device (chunked) and the public
function that checks its arguments and picks an implementation (api). Nothing here knows the model that uses it.
"""

from pallas_kernels.hebbian.api import hebbian_scan, hebbian_step
from pallas_kernels.resolvent.api import resolvent_scan

__all__ = ["hebbian_scan", "hebbian_step", "resolvent_scan"]
