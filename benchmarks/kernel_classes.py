"""Which part of a training step a kernel on a GPU belongs to, by its name and the operation it computes."""

import re
from typing import NamedTuple

# The first that fits counts, so the order matters: kernels of split products have "reduce" in their names, too.
SCANS = (
    ("Hebbian scan: its kernels", r"mosaic|(sweep|queries|cotangents|prepare|collect|join|recurrence)_kernel"),
    ("delta rule: its kernel", r"^walk_kernel"),
    ("resolvent scan: its kernels", r"^(maps|entries|fractions|carries|incoming|adjoint)_kernel"),
)
SCOPES = (
    ("Hebbian scan: its kernels", "Hebbian scan: the rest", "hebbian_scan"),
    ("delta rule: its kernel", "delta rule: the corrections", "delta_correction"),
    ("resolvent scan: its kernels", "resolvent scan: the rest", "resolvent_scan"),
)
# A compiled program calls every Triton kernel by this name; of its operation only the scope is known.
TRITON_CALL = "triton_kernel_call"
OTHERS = (
    ("matrix products", r"gemm|gemv|cutlass|cublas|xmma|nvjet|splitk|(^|_)dot(_|$)"),
    ("sorting, scatter, gather", r"sort|scatter|gather|radix|topk"),
    ("reductions", r"reduce"),
    ("copies, slices, stacking", r"memcpy|memset|copy|slice|concatenate|transpose|(^|_)pad(_|$)"),
)
REST = "elementwise and other"


class Kernel(NamedTuple):
    """A launch; times in microseconds, operation as jax names it or empty."""

    name: str
    operation: str
    start: float
    duration: float


def classify(kernel: Kernel) -> str:
    """The row of the table a kernel counts in."""
    for label, pattern in SCANS:
        if re.search(pattern, kernel.name, re.IGNORECASE):
            return label
    for own, rest, scope in SCOPES:
        if scope in kernel.operation:
            return own if kernel.name == TRITON_CALL else rest
    for label, pattern in OTHERS:
        if re.search(pattern, kernel.name, re.IGNORECASE):
            return label
    return REST
