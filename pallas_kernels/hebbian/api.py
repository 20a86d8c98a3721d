"""hebbian_scan and hebbian_step: argument checks and choice of the implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.hebbian import chunked, naive, narrow, parts, sweep


def _width(problem: registry.Problem) -> int:
    return max(problem.shapes["q"][-1], problem.shapes["v"][-1])


def _why_not_mosaic(problem: registry.Problem) -> str | None:
    """What its kernel was checked with on a device."""
    device = problem.device
    if int(registry.compute_capability(device)) != 9:
        return f"it needs an NVIDIA GPU of sm_90, whose matrix instructions no other has, this is {device}"
    dtypes = {str(jnp.dtype(problem.dtypes[name])) for name in ("q", "k", "v")}
    if dtypes != {"bfloat16"}:
        return f"it takes bfloat16 q, k and v, got {', '.join(sorted(dtypes))}"
    return None


def _mosaic_scan(*arguments):
    # Imported on use: it needs jax's GPU plugin.
    from pallas_kernels.hebbian import mosaic

    fused = mosaic.FUSED
    if registry.has_triton():
        # What comes before and after the kernels in one launch each, where XLA takes several.
        from pallas_kernels.hebbian import triton

        around = triton.FUSED
        fused = dataclasses.replace(fused, prepare=around.prepare, collect=around.collect, join=around.join)
    narrow_scan = functools.partial(sweep.scan, fused=fused)
    return parts.scan(*arguments, narrow_scan=narrow_scan, widest=max(fused.widths))


# Of the forward at width 128, the largest; up to 64 every GPU holds all.
_WIDE_TRITON = 133


def _why_not_triton(problem: registry.Problem) -> str | None:
    width = _width(problem)
    dtypes = {str(jnp.dtype(problem.dtypes[name])) for name in ("q", "k", "v")}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        return f"it takes q, k and v all bfloat16 or all float32, got {', '.join(sorted(dtypes))}"
    widest = 64 if dtypes == {"float32"} else 256
    if width > widest:
        return f"it takes K and V up to {widest} in {dtypes.pop()}, got {width}"
    held = registry.shared_memory(problem.device)
    if width > 64 and held < _WIDE_TRITON:
        return f"for K or V above 64 it needs {_WIDE_TRITON} KiB of shared memory, {problem.device} has {held}"
    return registry.why_not_triton(problem)


def _triton_scan(*arguments):
    q, _, v = arguments[:3]
    if q.dtype == jnp.float32 and q.shape[-1] * v.shape[-1] <= narrow.LARGEST_STATE:
        # The tiles of the fused form would be nearly all padding.
        from pallas_kernels.hebbian import triton_narrow

        return narrow.scan(*arguments, recurrence=triton_narrow.recurrence)
    from pallas_kernels.hebbian import triton

    return sweep.scan(*arguments, fused=triton.FUSED)


# Fastest first: the first that can run a call is the default.
IMPLEMENTATIONS: tuple[registry.Implementation, ...] = (
    registry.Implementation("mosaic", _mosaic_scan, _why_not_mosaic, kernel=True),
    registry.Implementation("triton", _triton_scan, _why_not_triton, kernel=True),
    registry.Implementation("xla", chunked.scan, registry.runs_anywhere),
    registry.Implementation("naive", naive.scan, registry.runs_anywhere),
)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(message)


def _state_dtype(*arrays: jax.Array):
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def _check_vectors(operation: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: str) -> None:
    rank = len(layout.split(","))
    for name, x in (("q", q), ("k", k), ("v", v)):
        _refuse(x.ndim != rank, f"{operation}: {name} must be ({layout}), got shape {x.shape}")
        _refuse(not jnp.issubdtype(x.dtype, jnp.floating), f"{operation}: {name} must be floating point, got {x.dtype}")
        _refuse(0 in x.shape, f"{operation}: {name} has an empty axis, shape {x.shape}; every size must be at least 1")
    _refuse(q.shape != k.shape, f"{operation}: q and k must have one shape, got {q.shape} and {k.shape}")
    _refuse(
        q.shape[:-1] != v.shape[:-1],
        f"{operation}: v must agree with q in all axes but the last, got {v.shape} and {q.shape}",
    )


def _check_log_decay(operation: str, log_decay: jax.Array, shape: tuple[int, ...]) -> None:
    _refuse(
        log_decay.shape not in (shape, (*shape[:-1], 1)),
        f"{operation}: log_decay must be {shape} or {(*shape[:-1], 1)}, got shape {log_decay.shape}",
    )
    _refuse(
        log_decay.dtype not in (jnp.float32, jnp.float64),
        f"{operation}: log_decay must be float32, got {log_decay.dtype}; half precision cannot hold slow decays",
    )


def _broadcast_eta(operation: str, eta: jax.Array | float, shape: tuple[int, ...], dtype) -> jax.Array:
    eta = jnp.asarray(eta, dtype)
    try:
        return jnp.broadcast_to(eta, shape)
    except ValueError as error:
        raise ValueError(f"{operation}: eta of shape {eta.shape} does not broadcast to {shape}") from error


def _check_reset(operation: str, reset: jax.Array, shape: tuple[int, ...]) -> None:
    _refuse(reset.shape != shape, f"{operation}: reset must be {shape}, got shape {reset.shape}")
    _refuse(reset.dtype != jnp.bool_, f"{operation}: reset must be bool, got {reset.dtype}")


def check_scan(
    name: str,
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay: jax.Array,
    eta: jax.Array | float,
    initial_state: jax.Array | None,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The arguments of scan `name` as its implementations take them: gates (B, N, H) and a state, in the state's dtype.

    Raises:
      ValueError: for other shapes or dtypes than hebbian_scan's.
    """
    _check_vectors(name, q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, "B, N, H, K")
    batch, num_tokens, heads, key_width = q_BxNxHxK.shape
    gates = (batch, num_tokens, heads)
    dtype = _state_dtype(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV)
    _check_log_decay(name, log_decay, gates)
    if reset is not None:
        _check_reset(name, reset, gates[:2])
    state_shape = (batch, heads, key_width, v_BxNxHxV.shape[-1])
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, dtype)
    _refuse(
        initial_state.shape != state_shape,
        f"{name}: initial_state must be {state_shape}, got shape {initial_state.shape}",
    )
    eta_BxNxH = _broadcast_eta(name, eta, gates, dtype)
    log_decay_BxNxH = jnp.broadcast_to(log_decay.astype(dtype), gates)
    return q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, initial_state.astype(dtype), reset


def results_placed_like(v_BxNxHxV: jax.Array) -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """Places of y and the final state in a mesh of explicit axes."""
    return registry.placed_like(v_BxNxHxV, 0, 1, 2, 3), registry.placed_like(v_BxNxHxV, 0, 2, None, 3)


def choose(name: str, arrays: tuple, implementation: str | None) -> registry.Implementation:
    """What runs `hebbian_scan` on arguments that `check_scan` returned.

    Raises:
      ValueError: `implementation` cannot; the message begins with `name`.
    """
    q, k, v, _, _, state, reset = arrays
    problem = registry.Problem(
        device=registry.default_device(),
        shapes={"q": q.shape, "v": v.shape},
        dtypes={"q": q.dtype, "k": k.dtype, "v": v.dtype, "state": state.dtype},
        options={"reset": reset is not None},
        tracked=bool(registry.varying_axes(arrays)),
    )
    return registry.choose(name, IMPLEMENTATIONS, implementation, problem)


@jax.named_scope("hebbian_scan")
def hebbian_scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay: jax.Array,
    eta: jax.Array | float,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dissipative Hebbian memory over a sequence: W_t = exp(log_decay_t) W_{t-1} + eta_t k_t v_t^T, y_t = W_t^T q_t.

    Args:
      q_BxNxHxK, k_BxNxHxK, v_BxNxHxV: queries, keys, values; bfloat16, float16, float32 or float64; N >= 1, V
        may differ from K.
      log_decay: (B, N, H), or (B, N, 1) for all heads alike; float32, finite, <= 0; minus (rate x time) per token.
      eta: strength of the write, a float or anything that broadcasts to (B, N, H).
      initial_state: (B, H, K, V), the memory before the first token; None is an empty one.
      reset: (B, N) bool; True wipes the memory just before that token.
      implementation: "naive", "xla", "mosaic" (NVIDIA GPUs of sm_90), "triton" (from sm_80), or None for the fastest
        that can run the call. With several devices that is "xla", as the compiler cannot divide the kernels among them,
        except inside a `jax.shard_map` with check_vma=False.

    Returns:
      y (B, N, H, V) in v's dtype, read after the write of the same token, and the final state (B, H, K, V) in float32.
      With any of q, k, v in float64 everything is computed and returned in float64.

    Differentiable in every floating argument, through both results.

    Raises:
      ValueError: for shapes or dtypes other than these, and for an implementation that cannot run the call.
    """
    name = "hebbian_scan"
    arrays = check_scan(name, q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay, eta, initial_state, reset)
    run = registry.place_freely(choose(name, arrays, implementation).run, *results_placed_like(v_BxNxHxV))
    return run(*registry.vary_alike(arrays))


def hebbian_step(
    q_BxHxK: jax.Array,
    k_BxHxK: jax.Array,
    v_BxHxV: jax.Array,
    log_decay_BxH: jax.Array,
    eta_BxH: jax.Array | float,
    state_BxHxKxV: jax.Array,
    *,
    reset_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of hebbian_scan, for decoding: y (B, H, V) in v's dtype, the new state in float32 (or float64, as is).

    log_decay may be (B, 1) and eta anything that broadcasts to (B, H); reset_B bool wipes the memory before the token.

    Raises:
      ValueError: for other shapes or dtypes.
    """
    name = "hebbian_step"
    _check_vectors(name, q_BxHxK, k_BxHxK, v_BxHxV, "B, H, K")
    gates = q_BxHxK.shape[:2]
    dtype = _state_dtype(state_BxHxKxV)
    _check_log_decay(name, log_decay_BxH, gates)
    if reset_B is not None:
        _check_reset(name, reset_B, gates[:1])
    state_shape = (*q_BxHxK.shape, v_BxHxV.shape[-1])
    _refuse(state_BxHxKxV.shape != state_shape, f"{name}: state must be {state_shape}, got shape {state_BxHxKxV.shape}")
    log_decay_BxH = jnp.broadcast_to(log_decay_BxH.astype(dtype), gates)
    eta_BxH = _broadcast_eta(name, eta_BxH, gates, dtype)
    return naive.step(q_BxHxK, k_BxHxK, v_BxHxV, log_decay_BxH, eta_BxH, state_BxHxKxV.astype(dtype), reset_B)
