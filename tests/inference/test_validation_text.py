"""The text a run held back: found again, or refused where it is another one by now."""

import json
from dataclasses import replace

import pytest

from phase2_jax.data.config import DataConfig, TaskConfig
from phase2_jax.data.corpora import load_corpus
from phase2_jax.data.tokenizers import ByteTokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference.loading import load_model
from phase2_jax.training.checkpoints import BEST, CheckpointDirectory
from phase2_jax.training.setup import fingerprint

TEXT = "What the memory wrote yesterday it forgets today.\n" * 20


@pytest.fixture
def of_a_text(loaded, tmp_path, monkeypatch):
    """A model that was trained on ts.txt, named as one does from its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ts.txt").write_text(TEXT)
    data = DataConfig(path="ts.txt")
    known = fingerprint(load_corpus(data, loaded.tokenizer))
    return replace(loaded, config=replace(loaded.config, data=data), corpus_fingerprint=known)


def test_the_text_of_the_run_is_found_again(of_a_text):
    assert of_a_text.validation_text("--data").num_bytes == len(TEXT) // 10


@pytest.mark.parametrize("changed", [TEXT + "More of it.", TEXT[:-100], TEXT.replace("forgets", "forgave")])
def test_another_text_is_refused(of_a_text, tmp_path, changed):
    (tmp_path / "ts.txt").write_text(changed)
    with pytest.raises(UserError, match=r"\(ts\.txt\) has changed since [^\n]* name a text with --data"):
        of_a_text.validation_text("--data")
    # Older checkpoints do not know their text.
    assert len(replace(of_a_text, corpus_fingerprint=None).validation_text("--data"))


def test_a_text_named_from_elsewhere(of_a_text, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data\.path='ts\.txt' [^\n]* relative to [^\n]* --passage"):
        of_a_text.validation_text("--passage")


def test_a_task_has_no_text(loaded):
    data = DataConfig(mode="windows", task=TaskConfig(name="mqar"))
    with pytest.raises(UserError, match=r"the task 'mqar' [^\n]*benchmarks/task_accuracy\.py"):
        replace(loaded, config=replace(loaded.config, data=data)).validation_text("--data")


def test_a_checkpoint_knows_its_text(write_run, tmp_path):
    workdir = write_run(tmp_path / "run", steps={BEST: 2})
    assert load_model(workdir).corpus_fingerprint is None
    for file in (workdir / BEST / "2" / "progress").iterdir():
        file.write_text(json.dumps({"tokenizer": ByteTokenizer().fingerprint(), "corpus": "text"}))
    checkpoints = CheckpointDirectory(workdir / BEST, read_only=True)
    assert checkpoints.progress(2)["corpus"] == "text"
    checkpoints.close()
    assert load_model(workdir).corpus_fingerprint == "text"
