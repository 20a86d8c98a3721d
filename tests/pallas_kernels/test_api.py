"""What the public functions refuse, and how they choose an implementation."""

import dataclasses
import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import delta_scan, hebbian_scan, hebbian_step, registry, resolvent_scan
from pallas_kernels.hebbian import api as hebbian_api
from pallas_kernels.hebbian import narrow, tiled

B, N, H, K, V = 2, 5, 3, 4, 6


def hebbian_arguments():
    return {
        "q_BxNxHxK": jnp.ones((B, N, H, K)),
        "k_BxNxHxK": jnp.ones((B, N, H, K)),
        "v_BxNxHxV": jnp.ones((B, N, H, V)),
        "log_decay": -jnp.ones((B, N, H)),
        "eta": 0.1,
        "initial_state": None,
        "reset": None,
    }


def resolvent_arguments():
    return {
        "v_BxNxH": jnp.ones((B, N, H)),
        "gamma_BxNxH": jnp.ones((B, N, H)),
        "u": jnp.ones(H),
        "z_re": jnp.zeros(H),
        "z_im": jnp.ones(H),
        "initial_g": None,
        "reset": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BxNxHxK": jnp.ones((B, N, K))}, r"q must be \(B, N, H, K\)"),
        ({"k_BxNxHxK": jnp.ones((B, N, H, K + 1))}, "q and k must have one shape"),
        ({"v_BxNxHxV": jnp.ones((B, N + 1, H, V))}, "v must agree with q"),
        ({"q_BxNxHxK": jnp.ones((B, N, H, K), int)}, "q must be floating point"),
        ({"q_BxNxHxK": jnp.ones((B, 0, H, K))}, "empty axis"),
        ({"log_decay": -jnp.ones((B, 1, H))}, "log_decay must be"),
        ({"log_decay": -jnp.ones((B, N, H), jnp.bfloat16)}, "log_decay must be float32"),
        ({"eta": jnp.ones(H + 1)}, "eta of shape"),
        ({"initial_state": jnp.ones((B, H, V, K))}, "initial_state must be"),
        ({"reset": jnp.zeros((B, N, H), bool)}, "reset must be"),
        ({"reset": jnp.zeros((B, N))}, "reset must be bool"),
        ({"implementation": "mosaic2"}, "'mosaic2' is not in this version"),
    ],
)
def test_hebbian_scan_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        hebbian_scan(**{**hebbian_arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_BxNxH": jnp.ones((N, H))}, r"v must be \(B, N, H\)"),
        ({"v_BxNxH": jnp.ones((B, 0, H))}, "empty axis"),
        ({"gamma_BxNxH": jnp.ones((B, N, 1))}, "gamma must have v's shape"),
        ({"u": jnp.ones((N, H))}, "u must be"),
        ({"z_im": jnp.ones(H + 1)}, "z_im must be"),
        ({"z_re": jnp.ones(H, int)}, "z_re must be floating point"),
        ({"mode": "both"}, "mode must be one of"),
        ({"mode": "bidirectional", "initial_g": (jnp.ones((B, H)), jnp.ones((B, H)))}, "initial_g belongs to"),
        ({"initial_g": (jnp.ones(H), jnp.ones(H))}, "initial_g must be two"),
        ({"reset": jnp.zeros((B, N), int)}, "reset must be bool"),
        ({"implementation": "magic"}, "'magic' is not in this version"),
    ],
)
def test_resolvent_scan_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        resolvent_scan(**{**resolvent_arguments(), **changes})


def test_hebbian_step_names_what_is_wrong():
    q, v, gate, state = jnp.ones((B, H, K)), jnp.ones((B, H, V)), -jnp.ones((B, H)), jnp.zeros((B, H, K, V))
    with pytest.raises(ValueError, match="state must be"):
        hebbian_step(q, q, v, gate, 0.1, state[:1])
    with pytest.raises(ValueError, match="log_decay must be"):
        hebbian_step(q, q, v, gate[:, :2], 0.1, state)
    with pytest.raises(ValueError, match="reset must be"):
        hebbian_step(q, q, v, gate, 0.1, state, reset_B=jnp.zeros((B, H), bool))


def problem():
    return registry.Problem(registry.default_device(), {"q": (B, N, H, K)}, {"q": jnp.float32})


def test_the_first_implementation_that_can_run_is_taken():
    hopper = registry.Implementation("fast", lambda: None, lambda p: f"needs a GPU, this is a {p.device.platform}")
    anywhere = registry.Implementation("plain", lambda: None, registry.runs_anywhere)
    able = dataclasses.replace(hopper, why_not=registry.runs_anywhere)
    assert registry.choose("scan", (hopper, anywhere), None, problem()) is anywhere
    assert registry.choose("scan", (able, anywhere), None, problem()) is able
    assert registry.choose("scan", (able, anywhere), "plain", problem()) is anywhere
    with pytest.raises(
        ValueError,
        match=f"scan: implementation 'fast' cannot run this call: needs a GPU, .* a {problem().device.platform}",
    ):
        registry.choose("scan", (hopper, anywhere), "fast", problem())
    with pytest.raises(ValueError, match="it has 'fast', 'plain'"):
        registry.choose("scan", (hopper, anywhere), "other", problem())


def test_the_default_device_is_the_one_chosen_for_jax():
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert registry.default_device() == cpu
    with jax.default_device("cpu"):
        assert registry.default_device() == cpu


class Gpu:
    def __init__(self, compute_capability: str):
        self.platform, self.compute_capability = "gpu", compute_capability


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "chosen"),
    [
        ("9.0", jnp.bfloat16, (64, 128), "mosaic"),
        ("9.0", jnp.float32, (64, 64), "triton"),
        ("8.6", jnp.bfloat16, (64, 64), "triton"),
        ("10.0", jnp.bfloat16, (64, 64), "triton"),
        ("9.0", jnp.bfloat16, (16, 96), "mosaic"),
        ("9.0", jnp.bfloat16, (64, 192), "mosaic"),
        ("9.0", jnp.bfloat16, (600, 257), "mosaic"),
        ("8.0", jnp.bfloat16, (64, 192), "triton"),
        ("8.0", jnp.bfloat16, (64, 128), "triton"),
        ("8.9", jnp.bfloat16, (64, 96), "xla"),
        ("8.0", jnp.bfloat16, (64, 257), "xla"),
        ("9.0", jnp.float32, (64, 128), "xla"),
        ("8.0", jnp.float32, (1, 2), "triton"),
        ("9.0", jnp.bfloat16, (1, 2), "mosaic"),
        ("7.5", jnp.float32, (1, 2), "xla"),
        ("7.5", jnp.bfloat16, (64, 64), "xla"),
        ("gfx942", jnp.bfloat16, (64, 64), "xla"),
    ],
)
def test_a_gpu_takes_its_kernel_by_itself(monkeypatch, capability, dtype, widths, chosen):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    shapes = {"q": (B, N, H, widths[0]), "v": (B, N, H, widths[1])}
    on_gpu = registry.Problem(Gpu(capability), shapes, dict.fromkeys(("q", "k", "v"), dtype))
    table = hebbian_api.IMPLEMENTATIONS
    assert registry.choose("scan", table, None, on_gpu).name == chosen
    # Of several devices each would compute everything, except where its part has been given to it.
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert registry.choose("scan", table, None, on_gpu).name == "xla"
    inside = []

    def part(x):
        inside.append(registry.choose("scan", table, None, on_gpu).name)
        return x

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(jnp.ones(2))
    assert set(inside) == {chosen}


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "taken"),
    [
        ("9.0", jnp.float32, (1, 2), "narrow"),
        ("8.6", jnp.float32, (4, 4), "narrow"),
        ("9.0", jnp.float32, (4, 5), "fused"),
        ("8.6", jnp.bfloat16, (1, 2), "fused"),
    ],
)
def test_narrow_states_have_a_triton_kernel_of_their_own(monkeypatch, implementation, capability, dtype, widths, taken):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(registry, "default_device", lambda: Gpu(capability))
    launched = []

    def recurrence(*arguments):
        launched.append("narrow")
        return narrow.recurrence(*arguments)

    def forward(*arguments):
        launched.append("fused")
        return tiled.fused(4).forward(*arguments)

    # In the places of the modules that need a GPU.
    fused = dataclasses.replace(tiled.fused(4), forward=forward)
    for name, module in (("triton_narrow", {"recurrence": recurrence}), ("triton", {"FUSED": fused})):
        monkeypatch.setitem(sys.modules, f"pallas_kernels.hebbian.{name}", types.SimpleNamespace(**module))
    q, v = (jnp.ones((B, N, H, width), dtype) for width in widths)
    y, final = hebbian_scan(q, q, v, -jnp.ones((B, N, H)), 0.1, implementation=implementation)
    assert launched == [taken]
    assert y.shape == v.shape
    assert final.shape == (B, H, *widths)


@pytest.mark.parametrize("operation", ["hebbian", "resolvent"])
def test_a_kernel_wants_a_shard_map_that_does_not_follow_what_varies(operation):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))

    def scan(x, implementation):
        if operation == "hebbian":
            return hebbian_scan(x, x, x, -(x[..., 0] ** 2), 1.0, implementation=implementation)[0]
        head = jnp.ones(x.shape[2])
        return resolvent_scan(x[..., 0], x[..., 1], head, head, head, implementation=implementation)[0]

    def run(implementation, check_vma):
        part = functools.partial(scan, implementation=implementation)
        options = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data"), "check_vma": check_vma}
        return jax.jit(jax.shard_map(part, **options))(jnp.ones((2, 8, 1, 32)))

    assert bool(jnp.all(run(None, True) == run(None, False)))
    with pytest.raises(ValueError, match="it needs check_vma=False"):
        run("triton", True)
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU"):
        run("triton", False)


@pytest.mark.parametrize("operation", ["hebbian", "delta", "resolvent"])
def test_axes_of_a_mesh_may_be_explicit(operation):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    def scan(x):
        if operation == "resolvent":
            head = jnp.ones(x.shape[2])
            return resolvent_scan(x[..., 0], x[..., 1] ** 2, head, head, head)[0]
        chosen = hebbian_scan if operation == "hebbian" else delta_scan
        return chosen(x, x, x, -(x[..., 0] ** 2), 0.5)[0]

    x = jnp.sin(jnp.arange(2 * 8 * 1 * 4.0)).reshape(2, 8, 1, 4)
    plain = jax.jit(lambda x: (scan(x), jax.grad(lambda x: jnp.sum(scan(x)))(x)))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
    for found, expected in zip(plain(placed), plain(x), strict=True):
        assert jax.typeof(found).sharding.spec[0] == "data"
        # float32 rounding: the compiler may merge other operations.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Tokens on an axis, and a shard_map over one of two axes, which leaves the other explicit inside.
    assert jax.jit(scan)(jax.device_put(x, jax.sharding.NamedSharding(mesh, P(None, "data")))).shape[1] == 8
    both = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    part = jax.shard_map(scan, mesh=both, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    split = jax.device_put(x, jax.sharding.NamedSharding(both, P("data")))
    with jax.set_mesh(both):
        np.testing.assert_allclose(jax.jit(part)(split), plain(x)[0], rtol=1e-5, atol=1e-6)
