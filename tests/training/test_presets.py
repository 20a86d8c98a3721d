"""The configuration files: they load, they are valid, and their sizes are the documented ones."""

import importlib.util
from pathlib import Path

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from phase2_jax.data.tokenizers import ByteTokenizer
from phase2_jax.errors import UserError
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.physics.potential import longest_half_life
from phase2_jax.training.config import ExperimentConfig, default_config, from_config_dict
from phase2_jax.training.setup import resolve_model
from phase2_jax.training.workdir import flatten

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {
    "tiny": (128, 4, 4, 32),
    "small": (256, 4, 4, 64),
    "base": (512, 6, 8, 64),
    "large": (1024, 12, 16, 64),
}


def load(name: str, *variant: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_valid_and_its_memory_spans_the_sequence(name):
    config = from_config_dict(load(name))
    model = config.model
    assert (model.d_model, model.num_layers, model.num_heads, model.head_dim) == SIZES[name]
    # No warning about half-lives that base_decay cuts short, and consolidation inside every sequence.
    assert longest_half_life(model.base_decay, model.dt) >= (model.half_life_max or config.train.seq_len)
    assert 0 < model.consolidation.interval < config.train.seq_len
    assert config.train.seq_len % model.consolidation.interval == 0
    assert config.train.num_epochs >= 3


def test_every_preset_has_a_file_and_every_file_a_recipe():
    files = sorted(path.stem for path in CONFIGS.glob("*.py"))
    assert files == sorted(SIZES)
    for path in CONFIGS.glob("*.py"):
        assert f"--config=configs/{path.name} --workdir=runs/{path.stem}" in path.read_text(encoding="utf-8")


RECIPES = sorted(path.stem for path in (CONFIGS / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_says_how_it_is_run(name, tmp_path):
    config = load(f"benchmarks/{name}")
    if config.data.format == "wikitext":
        config.data.path = str(tmp_path)
    from_config_dict(config)
    text = (CONFIGS / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python train.py --config=configs/benchmarks/{name}.py" in text


@pytest.mark.parametrize(
    ("name", "variant", "wanted"),
    [
        ("books", "3000", "a length that divides 32768"),
        ("books", "2048,1b", "a length that divides 32768, or LENGTH,125m"),
        ("mqar", "512", "LENGTH,PAIRS,WIDTH"),
        ("mqar_mixture", "2,128", "HEADS,K,V"),
    ],
)
def test_a_recipe_names_a_wrong_variant(name, variant, wanted):
    with pytest.raises(UserError, match=wanted):
        load(f"benchmarks/{name}", variant)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("2048", 27_835_672), ("8192", 27_835_656), ("2048,125m", 123_960_420)],
)
def test_models_of_books_have_the_sizes_that_are_compared(variant, parameters):
    config = resolve_model(from_config_dict(load("benchmarks/books", variant)).model, ByteTokenizer().vocab_size)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, seq_len=2048, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_every_setting_can_be_named_on_the_command_line():
    # A ConfigDict finds its own methods (items, values, ...) before a field of that name.
    assert not {name for path in flatten(default_config().to_dict()) for name in path.split(".")} & set(dir(ConfigDict))


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_the_original_initialisation_is_a_variant(name):
    config = from_config_dict(load(name, "original_init"))
    assert config.model.zeta_init
    assert config.model.position_embedding == "zeta"
    with pytest.raises(UserError, match="there is original_init"):
        load(name, "original")


@pytest.mark.parametrize(("variant", "parameters"), [("base", 20_933_872), ("125m", 125_116_880)])
def test_the_runs_that_measure_speed_have_the_sizes_they_say(variant, parameters):
    config = from_config_dict(load("benchmarks/throughput", variant))
    model = resolve_model(config.model, ByteTokenizer.vocab_size)
    assert (model.dtype, config.train.seq_len, config.train.batch_size) == ("bfloat16", 2048, 16)
    assert longest_half_life(model.base_decay, model.dt) >= config.train.seq_len
    shapes = nnx.eval_shape(lambda: LanguageModel(model, seq_len=2048, rngs=nnx.Rngs(params=0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) == parameters
    assert f"{parameters:,}" in (CONFIGS / "benchmarks" / "throughput.py").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="there are base, 125m"):
        load("benchmarks/throughput", "130m")


def test_a_configuration_file_cannot_set_a_field_that_does_not_exist():
    assert from_config_dict(default_config()) == ExperimentConfig()
    config = default_config()
    with pytest.raises(AttributeError):
        config.model.no_such_field = 1
