"""resolvent_scan: argument checks and choice of the implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.complex_pairs import Pair
from pallas_kernels.resolvent import chunked, lanes, naive

MODES = ("causal", "bidirectional")


@dataclasses.dataclass(frozen=True)
class _Forms:
    """The two modes of one implementation."""

    causal: Callable[..., Pair]
    bidirectional: Callable[..., Pair]

    def __call__(self, x: Pair, u: jax.Array, initial_g: Pair, mode: str) -> Pair:
        return self.causal(x, u, initial_g) if mode == "causal" else self.bidirectional(x, u)


def _why_not_triton(problem: registry.Problem) -> str | None:
    if problem.dtypes["state"] != jnp.float32:
        return f"it computes in float32, not {jnp.dtype(problem.dtypes['state'])}"
    return registry.why_not_triton(problem)


def _triton_scan(x: Pair, u: jax.Array, initial_g: Pair) -> Pair:
    # Imported on use: it needs jax-triton.
    from pallas_kernels.resolvent import triton

    return lanes.scan(x, u, initial_g, backend=triton.BACKEND)


def _triton_diagonal(x: Pair, u: jax.Array) -> Pair:
    return chunked.diagonal(x, u, causal=_triton_scan)


# Fastest first: the first that can run a call is the default.
IMPLEMENTATIONS: tuple[registry.Implementation, ...] = (
    registry.Implementation("triton", _Forms(_triton_scan, _triton_diagonal), _why_not_triton, kernel=True),
    registry.Implementation("xla", _Forms(chunked.scan, chunked.diagonal), registry.runs_anywhere),
    registry.Implementation("naive", _Forms(naive.scan, naive.diagonal), registry.runs_anywhere),
)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(f"resolvent_scan: {message}")


def _check(v, gamma, u, z_re, z_im, reset, mode) -> None:
    _refuse(mode not in MODES, f"mode must be one of {MODES}, got {mode!r}")
    _refuse(v.ndim != 3, f"v must be (B, N, H), got shape {v.shape}")
    _refuse(0 in v.shape, f"v has an empty axis, shape {v.shape}; every size must be at least 1")
    _refuse(gamma.shape != v.shape, f"gamma must have v's shape {v.shape}, got {gamma.shape}")
    heads = v.shape[-1:]
    _refuse(u.shape not in (heads, v.shape), f"u must be {heads} or {v.shape}, got shape {u.shape}")
    for name, z in (("z_re", z_re), ("z_im", z_im)):
        _refuse(z.shape != heads, f"{name} must be {heads}, got shape {z.shape}")
    for name, x in (("v", v), ("gamma", gamma), ("u", u), ("z_re", z_re), ("z_im", z_im)):
        _refuse(not jnp.issubdtype(x.dtype, jnp.floating), f"{name} must be floating point, got {x.dtype}")
    if reset is not None:
        _refuse(reset.shape != v.shape[:2], f"reset must be {v.shape[:2]}, got shape {reset.shape}")
        _refuse(reset.dtype != jnp.bool_, f"reset must be bool, got {reset.dtype}")


def _check_initial(initial_g: Pair | None, mode: str, shape: tuple[int, int], dtype) -> Pair:
    if initial_g is None:
        zero = jnp.zeros(shape, dtype)
        return zero, zero
    _refuse(mode == "bidirectional", "initial_g belongs to mode 'causal'; the two-sided chain has no incoming side")
    re, im = initial_g
    _refuse(re.shape != shape or im.shape != shape, f"initial_g must be two {shape}, got {re.shape} and {im.shape}")
    return re.astype(dtype), im.astype(dtype)


@jax.named_scope("resolvent_scan")
def resolvent_scan(
    v_BxNxH: jax.Array,
    gamma_BxNxH: jax.Array,
    u: jax.Array,
    z_re: jax.Array,
    z_im: jax.Array,
    initial_g: Pair | None = None,
    *,
    reset: jax.Array | None = None,
    mode: str = "causal",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, Pair | None]:
    """Green's function of the tridiagonal H_eff = H_0 + V - i Gamma at z = E + i eps.

    mode "causal": the left-connected g_t = 1 / (v_t - i gamma_t - z - u_t g_{t-1}), from the past alone.
    mode "bidirectional": the exact diagonal G_tt of (H_eff - z)^{-1}, which sees both sides.

    For u >= 0 and gamma + eps > 0 the result is bounded by 1 / (gamma_t + eps), for any input and without clamps.
    Proof: let Im g_{t-1} >= 0 (true of an empty start; required of initial_g). The denominator
    d_t = v_t - E - i (gamma_t + eps) - u_t g_{t-1} has
        Im d_t = -(gamma_t + eps) - u_t Im g_{t-1} <= -(gamma_t + eps) < 0,
    hence |g_t| = 1 / |d_t| <= 1 / |Im d_t| <= 1 / (gamma_t + eps), and Im g_t = -Im d_t / |d_t|^2 > 0 carries the
    premise to t + 1. The two-sided G_tt subtracts u_{t+1} gR_{t+1} as well, whose imaginary part has the same sign: the
    same bound holds. For u of either sign the recursion is the same, without the bound.

    Args:
      v_BxNxH: real potential. gamma_BxNxH: forgetting rate.
      u: squared coupling, (H,) or (B, N, H); u_t couples t - 1 and t (u_0 couples to initial_g).
      z_re, z_im: (H,), energy and its imaginary part eps.
      initial_g: the pair (re, im) of (B, H) from the token before the first, in mode "causal" only; None is zero.
      reset: (B, N) bool; True cuts the coupling between that token and the one before it.
      implementation: "naive", "xla", "triton" (NVIDIA GPUs from sm_80, float32), or None for the fastest
        that can run the call.

    Returns:
      g_re, g_im (B, N, H) and final_g, the pair of their last tokens (None in mode "bidirectional"). Everything is
      float32, or float64 when v or gamma is.

    Differentiable in every floating argument, through all results.

    Raises:
      ValueError: for shapes, dtypes or modes other than these, and for an implementation that cannot run the call.
    """
    u, z_re, z_im = jnp.asarray(u), jnp.asarray(z_re), jnp.asarray(z_im)
    _check(v_BxNxH, gamma_BxNxH, u, z_re, z_im, reset, mode)
    batch, _, heads = v_BxNxH.shape
    dtype = jnp.float64 if jnp.float64 in (v_BxNxH.dtype, gamma_BxNxH.dtype) else jnp.float32
    start = _check_initial(initial_g, mode, (batch, heads), dtype)
    x = (v_BxNxH.astype(dtype) - z_re.astype(dtype), -(gamma_BxNxH.astype(dtype) + z_im.astype(dtype)))
    u_BxNxH = jnp.broadcast_to(u.astype(dtype), v_BxNxH.shape)
    if reset is not None:
        u_BxNxH = jnp.where(reset[..., None], 0, u_BxNxH)
    arrays = (x, u_BxNxH, start)
    problem = registry.Problem(
        device=registry.default_device(),
        shapes={"v": v_BxNxH.shape, "u": u.shape},
        dtypes={"v": v_BxNxH.dtype, "state": dtype},
        options={"mode": mode, "reset": reset is not None},
        tracked=bool(registry.varying_axes(arrays)),
    )
    chosen = registry.choose("resolvent_scan", IMPLEMENTATIONS, implementation, problem)

    def run(*arrays):
        g_re, g_im = chosen.run(*arrays, mode)
        return g_re, g_im, g_re[:, -1], g_im[:, -1]

    place, last = registry.placed_like(v_BxNxH, 0, 1, 2), registry.placed_like(v_BxNxH, 0, 2)
    g_re, g_im, *final_g = registry.place_freely(run, place, place, last, last)(*registry.vary_alike(arrays))
    return g_re, g_im, (final_g[0], final_g[1]) if mode == "causal" else None
