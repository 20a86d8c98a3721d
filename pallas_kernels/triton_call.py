"""Launching a Triton kernel, in every supported version of jax-triton."""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax_triton

from pallas_kernels import registry

_PARAMETERS = inspect.signature(jax_triton.triton_call).parameters
# jax-triton 0.4 renamed the results, and Triton warns of products joined with sums where nobody has asked for that.
_SINCE_0_4 = "out_type" in _PARAMETERS
_RESULTS, _OPTIONS = ("out_type", {"backend_options": {"enable_fp_fusion": True}}) if _SINCE_0_4 else ("out_shape", {})


def launch(
    kernel: Any, inputs: tuple[jax.Array, ...], results: tuple[Any, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Runs a `triton.jit` kernel: inputs first, then results (shape and dtype each); options are grid and constants."""
    # Otherwise jax-triton asks the GPU of this machine, which need not be the one that is compiled for.
    if "compute_capability" in _PARAMETERS:
        options["compute_capability"] = round(10 * registry.compute_capability(registry.default_device()))
    return jax_triton.triton_call(*inputs, kernel=kernel, **{_RESULTS: results}, **_OPTIONS, **options)
