"""Which model is read, and what is said when there is none."""

import asyncio
import gc
import json
import shutil
import warnings
from dataclasses import replace

import jax
import pytest

from phase2_jax.data.tokenizers import WordTokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference.loading import load_model
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS


@pytest.fixture
def run(workdir, tmp_path):
    """A run that a test may break."""
    return shutil.copytree(workdir, tmp_path / "run")


def files(folder):
    return sorted((path.relative_to(folder), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_checkpoints_by_name(workdir):
    before = files(workdir)
    assert [load_model(workdir, name).step for name in ("best", "latest", "2", "3")] == [2, 3, 2, 3]
    assert files(workdir) == before


def test_the_fingerprint_is_that_of_the_numbers(workdir, loaded):
    assert loaded.fingerprint() == load_model(workdir, "latest").fingerprint()
    changed = jax.tree.map(lambda x: x, loaded.params)
    changed.head.kernel[...] = changed.head.kernel[...].at[0, 0].add(1e-3)
    assert loaded.fingerprint() != replace(loaded, params=changed).fingerprint()


@pytest.mark.parametrize("name", ["4", "worst", "-1", "²", ""])
def test_a_checkpoint_that_is_not_there(workdir, name):
    with pytest.raises(UserError, match="use best, latest or one of 2, 3"):
        load_model(workdir, name)


def test_a_run_without_checkpoints(run):
    shutil.rmtree(run / BEST)
    with pytest.raises(UserError, match=r"no best checkpoint \(.*\): use --checkpoint=latest"):
        load_model(run)
    assert load_model(run, "latest").step == 3
    shutil.rmtree(run / CHECKPOINTS)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(run)


def test_folders_that_are_no_run(tmp_path):
    for path, said in ((tmp_path / "absent", "does not exist"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=said):
            load_model(path)
    for content in ("{", "[]", '{"config": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="no configuration of a run"):
            load_model(tmp_path)


@pytest.mark.parametrize("pattern", ["*", "d/*"])
def test_a_damaged_checkpoint(run, pattern):
    for file in (run / BEST / "2" / "model").rglob(pattern):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"cannot be read .*: name another with --checkpoint"):
        load_model(run)


def test_nothing_more_is_heard_of_a_damaged_checkpoint(run, caplog):
    for file in (run / BEST / "2" / "model").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])

    # What orbax leaves behind depends on which read failed first; each kind is made here, for certain.
    async def read():
        pass

    with warnings.catch_warnings(record=True) as heard:
        # As outside of tests, where warnings are no errors.
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="cannot be read"):
            load_model(run)
        str(read())  # a warning
    assert not [warning for warning in heard if "never awaited" in str(warning.message)]
    str(read())  # an error that nobody can catch, which pytest would report
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(ValueError("block"))  # a message of asyncio's
    gc.collect()
    loop.close()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("changed", [{"ffn_dim": 9}, {"eta_gate": False}])
def test_a_checkpoint_of_another_version_is_not_called_damaged(run, changed):
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["model"] |= changed
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"holds other arrays [^\n]* use the version that wrote it"):
        load_model(run)


def test_a_run_of_other_layers(run):
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | {"architecture": "transformer"}))
    with pytest.raises(UserError, match=r"architecture 'transformer'\), which only benchmarks/baselines/train\.py"):
        load_model(run)


@pytest.mark.parametrize("words", ["a b c", " ".join(f"w{n}" for n in range(254))])
def test_a_tokenizer_of_another_model(run, words):
    tokenizer = WordTokenizer.train([words])
    (run / "tokenizer.json").write_text(tokenizer.to_json())
    with pytest.raises(UserError, match="is not the tokenizer the checkpoint was trained with"):
        load_model(run)
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_model(run)


def test_an_encoder_cannot_predict(run):
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["model"] |= {"bk_mode": "bidirectional", "encoder": True}
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="sees the future"):
        load_model(run)
