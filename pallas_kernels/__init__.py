"""Linear-time scans of the model: dissipative memory, Hebbian or error-correcting, and the resolvent of a tridiagonal
Hamiltonian.

Each operation has a folder with the law written plainly (naive), a chunked form for any device (chunked) and the public
function that checks its arguments and picks an implementation (api). Nothing here knows the model that uses it.
"""

from pallas_kernels.delta.api import delta_scan, delta_scan_with_values
from pallas_kernels.hebbian.api import hebbian_scan, hebbian_step
from pallas_kernels.resolvent.api import resolvent_scan

__all__ = ["delta_scan", "delta_scan_with_values", "hebbian_scan", "hebbian_step", "resolvent_scan"]
