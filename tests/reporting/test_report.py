"""The report: every figure of real runs on one page that needs nothing else, and plain words about what is missing."""

import base64
import dataclasses
import errno
import html
import io
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pallas_kernels import hebbian_scan
from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.inference.loading import load_model
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.memory.hebbian import Writes
from phase2_jax.memory.state import init_memory_state
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.reporting import inspection
from phase2_jax.reporting.__main__ import main
from phase2_jax.reporting.inspection import half_lives, inspect
from phase2_jax.reporting.passage import passage_figure, passage_html
from phase2_jax.reporting.run_files import RunFiles, read_runs
from phase2_jax.training.config import CheckpointConfig, ExperimentConfig, TrainConfig
from phase2_jax.training.history import TrainingHistory
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.train import train

TEXT = "Pay <b>attention</b>: the mémoire forgets & recalls.\nWhat it wrote fades.\n\n"
FIGURES = (
    "learning_curves",
    "gamma_evolution",
    "half_life_spectrum",
    "key_directions",
    "snr_selection",
    "resonance_modes",
    "stability",
    "optimisation",
    "passage",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(TEXT * 12, encoding="utf-8")
    config = ExperimentConfig(
        model=ModelConfig(
            d_model=8, num_layers=2, num_heads=2, head_dim=4, ffn_dim=8, consolidation=ConsolidationConfig(interval=8)
        ),
        data=DataConfig(path=str(folder / "text.txt")),
        train=TrainConfig(num_epochs=2, steps_per_epoch=2, batch_size=2, seq_len=16, num_val_batches=1),
        checkpoint=CheckpointConfig(every_steps=0),
        logging=LoggingConfig(tensorboard=False),
    )
    train(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(workdir: Path) -> RunFiles:
    return read_runs([workdir])[0]


def imagined(pieces: list[str]) -> inspection.Inspection:
    """An inspection of three layers with random figures."""
    rng = np.random.default_rng(0)
    uniform = lambda *shape: rng.uniform(0.01, 1.0, shape)  # noqa: E731
    num = len(pieces)
    return inspection.Inspection(
        checkpoint="imagined",
        dt=1.0,
        gamma_LxTxP=uniform(3, num + 5, 2),
        pieces=pieces,
        first=5,
        eta_LxN=uniform(3, num),
        readout_LxN=uniform(3, num),
        source_LxN=np.ones((3, num), int),
        share_LxN=uniform(3, num),
        loss_N=np.append(np.nan, uniform(num - 1)),
        context=[["</script>"] * num] * 3,
        key_directions_LxH=uniform(3, 2),
        query_directions_LxH=uniform(3, 2),
        snr_LxHxKxV=uniform(3, 2, 4, 4),
        energies_LxHxK=uniform(3, 2, 4),
        mask_LxHxK=uniform(3, 2, 4),
    )


@pytest.mark.slow
def test_two_runs_on_one_page(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "without"
    shutil.copytree(workdir, first)
    shutil.copytree(workdir, second, ignore=shutil.ignore_patterns("best", "checkpoints"))
    config = second / "config.json"
    config.write_text(re.sub(r'"threshold": 0\.1\b', '"threshold": 0.25', config.read_text()))
    (tmp_path / "passage.txt").write_text(TEXT, encoding="utf-8")
    assert main([str(first), str(second), f"--passage={tmp_path / 'passage.txt'}"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    plots = first / "plots"
    expected = {"report.html", "comparison.png", *(f"{name}.png" for name in FIGURES)}
    expected |= {f"without.{name}.png" for name in FIGURES if name != "passage"}
    assert {path.name for path in written} == expected
    assert expected == {path.name for path in plots.iterdir()}
    assert not (second / "plots").exists()
    page = (plots / "report.html").read_text(encoding="utf-8")
    # One file: nothing is loaded from elsewhere.
    assert re.findall(r"""(?:src|href)="(?!data:|#)""", page) == []
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(expected) - 1
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.convert("L").getextrema() == (0, 255)
    assert "<td>model.resonance.threshold</td><td>0.1</td><td>0.25</td>" in page
    assert "without has no checkpoint yet: train for longer" in page
    assert page.count('class="passage"') == 1


@pytest.mark.slow
def test_page_says_why_the_text_is_missing(workdir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        inspect(read_runs([copy])[0])
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        inspect(read_runs([copy])[0])


@pytest.mark.slow
def test_inspection_sees_what_the_model_does(run: RunFiles) -> None:
    seen = inspect(run, TEXT)
    assert run.config is not None
    tokens_T = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    # The last token before a multiple of the interval of 8.
    tokens_T = tokens_T[: tokens_T.size // 8 * 8 - 1]
    config = dataclasses.replace(run.config.model, vocab_size=256)
    model = nnx.eval_shape(lambda: LanguageModel(config, seq_len=16, rngs=nnx.Rngs(params=0)))
    graphdef, params = nnx.split(model)[0], load_model(run.workdir).params
    assert seen.checkpoint == "best checkpoint, step 4"
    reset_1xT = jnp.asarray(np.arange(tokens_T.size)[None] == 0)
    logits, state, diagnostics = nnx.merge(graphdef, params)(
        jnp.asarray(tokens_T[None]), init_state(config, 1), reset_BxN=reset_1xT, trace=True
    )
    assert diagnostics.gamma_LxBxNxP is not None
    # Two programs of the same float32 arithmetic, fused differently.
    np.testing.assert_allclose(seen.gamma_LxTxP, diagnostics.gamma_LxBxNxP[:, 0], rtol=1e-4)
    w_LxHxKxV = np.asarray(state.w_BxHxKxV[:, 0])
    sigma = w_LxHxKxV.std(axis=(-2, -1), keepdims=True) + 1e-6
    np.testing.assert_allclose(seen.snr_LxHxKxV, np.abs(w_LxHxKxV) / sigma, rtol=1e-3, atol=1e-4)
    # The basis is unitary: the modes share the memory's energy.
    np.testing.assert_allclose(np.square(seen.energies_LxHxK).sum(-1), np.square(w_LxHxKxV).sum((-2, -1)), rtol=1e-3)
    log_p = jax.nn.log_softmax(logits[0])
    expected = [-float(log_p[t - 1, tokens_T[t]]) for t in range(1, tokens_T.size)]
    assert np.isnan(seen.loss_N[0])
    np.testing.assert_allclose(seen.loss_N[1:], expected, rtol=1e-4)
    assert "".join(seen.pieces) == TEXT.encode()[: tokens_T.size].decode()
    assert seen.pieces[TEXT.encode().index("é".encode())] == ""  # the first byte of two adds no text yet
    assert (seen.source_LxN[:, 0] == 0).all()
    assert seen.context[0][0] == ""
    asked, answering = first_queries_and_keys(config, nnx.merge(graphdef, params), tokens_T[None], reset_1xT)
    np.testing.assert_allclose(seen.query_directions_LxH[0], inspection.directions(asked), rtol=1e-4)
    np.testing.assert_allclose(seen.key_directions_LxH[0], inspection.directions(answering), rtol=1e-4)


def first_queries_and_keys(config, model, tokens_1xT, reset_1xT) -> tuple[jax.Array, jax.Array]:
    """(T, H, K) each, of the first layer, from its parts."""
    blocks, params = nnx.split(model.blocks)
    block = nnx.merge(blocks, jax.tree.map(lambda leaf: leaf[0], params))
    state = jax.tree.map(lambda leaf: leaf[0], init_state(config, 1))
    x_1xTxD = model.embed(jnp.asarray(tokens_1xT), jnp.zeros((), jnp.int32))
    v, gamma, resolvent_gamma = block.potential(block.norm1(x_1xTxD), jnp.zeros(tokens_1xT.shape))
    x_1xTxD += block.resolvent(v, resolvent_gamma, state, reset_1xT)[0]
    writes, _ = block.memory.writes(block.norm2(x_1xTxD), gamma, state, reset_1xT)
    return writes.q_BxNxHxK[0], writes.k_BxNxHxK[0]


def test_most_recalled_token_is_the_largest_part_of_the_readout() -> None:
    rng = np.random.default_rng(0)
    num_tokens, num_heads, width = 11, 2, 3
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v = (normal(1, num_tokens, num_heads, width) for _ in range(3))
    log_decay = -jnp.abs(normal(1, num_tokens, num_heads))
    eta = jnp.abs(normal(1, num_tokens, num_heads))
    reset = np.zeros((1, num_tokens), bool)
    reset[0, 6] = True
    writes = Writes(q, k, v, log_decay, eta, jnp.asarray(reset))
    source_N, share_N = inspection._most_recalled(jax.tree.map(lambda a: a[0], writes), num_tokens)
    sizes_NxT = np.zeros((num_tokens, num_tokens))
    for write in range(num_tokens):
        # What the memory answers when only this token writes.
        alone = eta * (jnp.arange(num_tokens) == write)[None, :, None]
        y, _ = hebbian_scan(q, k, v, log_decay, alone, reset=jnp.asarray(reset), implementation="naive")
        sizes_NxT[:, write] = np.linalg.norm(np.asarray(y[0]), axis=-1).sum(axis=-1)
    earlier = np.tril(sizes_NxT, -1)
    expected = np.where(earlier.max(axis=1) > 0, earlier.argmax(axis=1), -1)
    np.testing.assert_array_equal(source_N, expected)
    assert expected[6] == -1  # a document begins: nothing to recall
    assert expected[7] == 6
    # Sums of float32 products in another order.
    np.testing.assert_allclose(share_N, earlier.max(axis=1) / sizes_NxT.sum(axis=1), rtol=1e-4)


def test_directions_of_keys() -> None:
    """In a basis that is not the axes', with keys of any length; and beside singular values of random keys."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    alike, two, all_of_them = (basis[np.arange(40) % num] for num in (1, 2, 8))
    random = rng.normal(size=(40, 8)) * np.arange(1, 9)
    keys_TxHxK = np.stack([3 * alike, two, 0.5 * all_of_them, random, np.zeros((40, 8))], axis=1)
    found = inspection.directions(jnp.asarray(keys_TxHxK, jnp.float32))
    squares = np.square(np.linalg.svd(random, compute_uv=False))
    expected = [1, 2, 8, squares.sum() ** 2 / np.square(squares).sum(), 0]
    # Sums of forty products in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_recalled_is_what_was_written() -> None:
    key = jnp.ones((1, 2, 1, 1))
    v = jnp.asarray([3.0, 5.0]).reshape(1, 2, 1, 1)
    ones = jnp.ones((1, 2, 1))
    writes = Writes(key, key, v, 0 * ones, ones, jnp.zeros((1, 2), bool))
    before = init_memory_state(1, 1, 1, 1, 1, 0)
    assert inspection._written(writes, before, "hebbian") is writes
    # The second write makes up for what the first left.
    np.testing.assert_allclose(inspection._written(writes, before, "delta").v_BxNxHxV.ravel(), [3, 2], rtol=1e-6)


def test_passage_shows_text_as_text() -> None:
    seen = imagined([*"Pay <b>$5</b>\nn", "", "é", " a whole word"])
    markup = passage_html(seen, "p")
    spans = re.findall(r'<span data-t="(\d+)">(.*?)</span>', markup)
    shown = html.unescape("".join(text for _, text in spans).replace("⏎<br>", "\n"))
    assert shown == "".join(seen.pieces)
    assert "<b>" not in re.sub(r"<script.*?</script>", "", markup, flags=re.DOTALL)
    assert markup.count("</script>") == 1
    figure = passage_figure(seen)
    drawn = "".join(text.get_text() for text in figure.axes[0].texts)
    assert drawn == "".join(seen.pieces).replace("\n", "⏎").replace("$", r"\$")


def test_half_life_is_when_half_is_left() -> None:
    lives = half_lives(np.array([0.5, 0.01]), dt=2.0)
    np.testing.assert_allclose(np.exp(-np.array([0.5, 0.01]) * 2.0 * lives), 0.5, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent"], "absent is not a folder"),
        (["."], "at least one epoch"),
        (["RUN", "RUN"], "is given twice"),
        (["RUN", "--passage=absent.txt"], "--passage=absent.txt cannot be read"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    TrainingHistory().write(tmp_path / "RUN")
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]


def test_a_run_that_cannot_be_written_to_gets_one_line(tmp_path, monkeypatch, capsys) -> None:
    TrainingHistory().write(tmp_path)

    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", read_only)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'plots'} cannot be written to (Read-only file system): name another")
    assert said.count("\n") == 1
