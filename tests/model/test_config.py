"""Values out of range are named, with what they may be."""

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from phase2_jax.errors import UserError
from phase2_jax.model.config import ModelConfig

NAN, INF = float("nan"), float("inf")


def with_fields(**changes: Any) -> ModelConfig:
    """`snr__threshold=1` changes the field of a group."""

    def change(config: Any, item: tuple[str, Any]) -> Any:
        head, _, rest = item[0].partition("__")
        return replace(config, **{head: change(getattr(config, head), (rest, item[1])) if rest else item[1]})

    return reduce(change, changes.items(), ModelConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("d_model", "num_layers", "num_heads", "head_dim", "conv_width")
            for value in (0, -1)
        ),
        ("vocab_size", -1),
        ("value_dim", -1),
        ("ffn_dim", -2),
        *(("dropout", value) for value in (-0.1, 1.0, NAN)),
        *((name, value) for name in ("base_decay", "dt", "half_life_min") for value in (0.0, -1.0, NAN, INF)),
        *(("epsilon_min", value) for value in (0.0, 0.009, NAN, INF)),
        *(("half_life_max", value) for value in (1.0, -1.0, NAN)),
        *((name, value) for name in ("eta", "readout_floor") for value in (-0.1, NAN, INF)),
        ("consolidation__interval", -1),
        *(("snr__threshold", value) for value in (-0.1, NAN, INF)),
        *(("snr__gamma_boost", value) for value in (0.9, NAN, INF)),
        *(("snr__eta_boost", value) for value in (0.9, NAN, INF)),
        *(("resonance__threshold", value) for value in (-0.1, 1.1, NAN)),
        *(("lyapunov__gamma_boost", value) for value in (0.9, NAN, INF)),
        ("dtype", "float16"),
        ("resolvent_gamma", "mine"),
        ("bk_mode", "two-sided"),
        ("position_embedding", "rotary"),
        ("plasticity", "Delta"),
    ],
)
def test_out_of_range(name, value):
    path = "model." + name.replace("__", ".")
    with pytest.raises(UserError, match=f"^{path}='?{value}'? must be [^\n]+$"):
        with_fields(**{name: value}).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_decay": 0.16},
        {"base_decay": 5.0, "adaptive_decay": False},
        {"eta": 0.0, "conv_width": 1, "ffn_dim": -1, "dropout": 0.99, "epsilon_min": 0.01},
        {"snr__threshold": 0.0, "resonance__threshold": 0.0, "snr__gamma_boost": 1.0, "consolidation__interval": 0},
        {"resonance__threshold": 1.0, "half_life_max": 2.0},
        {"bk_mode": "bidirectional", "encoder": True},
        {"position_embedding": "zeta", "d_model": 2},
        {"plasticity": "delta", "eta": 1.0},
    ],
)
def test_in_range(changes):
    with_fields(**changes).validate()


def test_a_language_model_does_not_look_ahead():
    with pytest.raises(UserError, match=r"model\.bk_mode=bidirectional .* use causal, or model\.encoder=True"):
        with_fields(bk_mode="bidirectional").validate()


def test_corrections_of_errors_that_could_grow():
    with pytest.raises(
        UserError,
        match=r"^model\.key_norm=False lets model\.plasticity=delta diverge .* use model\.key_norm=True, or [^\n]+$",
    ):
        with_fields(plasticity="delta", key_norm=False).validate()
    with pytest.raises(UserError, match=r"^model\.eta=1\.5 must be at most 1 with model\.plasticity=delta [^\n]+$"):
        with_fields(plasticity="delta", eta=1.5).validate()


def test_zeta_positions_need_an_even_width():
    with pytest.raises(UserError, match=r"model\.d_model=5 must be even for model\.position_embedding=zeta"):
        with_fields(position_embedding="zeta", d_model=5).validate()


def test_a_floor_above_the_shortest_half_life():
    with pytest.raises(
        UserError, match=r"model\.base_decay=0\.2 caps .* model\.half_life_min=2\.0: use less than 0\.17"
    ):
        with_fields(base_decay=0.2).validate()


def test_widths_by_default():
    config = ModelConfig(d_model=24, head_dim=6)
    assert (config.value_width, config.ffn_width, config.num_potentials) == (6, 96, 8)
    config = ModelConfig(value_dim=5, ffn_dim=7, shared_potential=True)
    assert (config.value_width, config.ffn_width, config.num_potentials) == (5, 7, 1)
    assert ModelConfig(ffn_dim=-1).ffn_width == 0
