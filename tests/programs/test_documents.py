"""The commands of the documents: what they name exists, and those of the README run as written."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phase2_jax.training.config import default_config
from phase2_jax.training.workdir import flatten

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
    *REPOSITORY.glob("docs/*.md"),
    *REPOSITORY.glob("configs/**/*.py"),
    *REPOSITORY.glob("benchmarks/**/*.py"),
]
# A run of two steps; the command's own settings come first and these replace them.
SHORT = (
    "--config.model.d_model=8",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.head_dim=4",
    "--config.model.ffn_dim=8",
    "--config.model.consolidation.interval=8",
    "--config.train.seq_len=16",
    "--config.train.batch_size=2",
    "--config.train.num_steps=2",
    "--config.train.steps_per_epoch=2",
    "--config.train.num_val_batches=1",
    "--config.logging.tensorboard=False",
)


def commands(text: str) -> list[list[str]]:
    """Arguments of Python in indented lines, with their continuation lines, and in the running text."""
    joined = re.sub(r"\\\n\s+", " ", text)
    lines = re.findall(r"^    python (.*)$", joined, re.MULTILINE) + re.findall(r"`python (.*?)`", joined)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_settings_and_files_in_commands_exist(document):
    text = document.read_text(encoding="utf-8")
    known = flatten(default_config().to_dict())
    groups = {name.rpartition(".")[0] for name in known}
    for path in re.findall(r"--config\.([a-z_][a-z_0-9.]*[a-z_0-9])", text):
        assert path in known or path in groups or path == "group.name", path
    for path in re.findall(r"(?:configs|benchmarks|docs|constraints)/[\w/]+\.(?:py|md|txt)", text):
        assert (REPOSITORY / path).exists() or path == "configs/NAME.py", path


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        if document.suffix != ".md":
            continue
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path):
    for name in ("train.py", "evaluate.py", "generate.py", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("my.txt", "novel.txt"):
        (tmp_path / name).write_text("What the memory wrote yesterday it forgets today.\n" * 40)

    def run(arguments: list[str]) -> None:
        result = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{arguments}: {result.stderr}"

    found = [arguments for arguments in commands(README) if not arguments[0].startswith("benchmarks/")]
    assert {arguments[0] for arguments in found} >= {"train.py", "evaluate.py", "generate.py", "-m"}
    trains = [arguments for arguments in found if arguments[0] == "train.py"]
    for arguments in trains:
        run([*arguments, *SHORT])
    shutil.copytree(tmp_path / "runs" / "x", tmp_path / "runs" / "y")
    for arguments in found:
        if arguments not in trains:
            run(arguments)
