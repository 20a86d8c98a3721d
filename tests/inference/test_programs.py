"""evaluate.py and generate.py as a user runs them: what is printed, and one line for every mistake."""

import io
import json
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

from phase2_jax.programs import evaluate as evaluate_program
from phase2_jax.programs import generate as generate_program

PROGRAMS: dict[str, Callable[[], None]] = {"evaluate": evaluate_program.main, "generate": generate_program.main}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a program in this process: `run(name, *arguments, stdin=None)` gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str, stdin: bytes | None = None):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        source = Terminal() if stdin is None else SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr("sys.stdin", source)
        status = 0
        try:
            PROGRAMS[name]()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_evaluate_prints_json_or_a_table(run, workdir, tmp_path):
    (tmp_path / "text.txt").write_text("some text, " * 3)
    arguments = (f"--workdir={workdir}", "--data=text.txt", "--batch_size=1")
    status, out, _ = run("evaluate", *arguments, "--json")
    result = json.loads(out)
    assert (status, result["tokens"], result["step"], result["memory_off"]) == (0, 32, 2, None)
    assert result["peak_rss_mb"] > 0
    status, out, _ = run("evaluate", *arguments, "--wipe_every=3", "--wipe_every=7", "--checkpoint=latest")
    assert status == 0
    assert "step 3: 32 tokens (bytes) of 1 document(s), 33 bytes" in out
    assert f"{result['loss']:.5g}" in out
    assert "wiped every 3  wiped every 7" in out


def test_generate_from_prompt_and_standard_input(run, workdir):
    arguments = (f"--workdir={workdir}", "--max_tokens=12", "--seed=1")
    status, out, err = run("generate", *arguments, "--prompt=abc")
    assert status == 0
    assert out.endswith("\n")
    assert "12 tokens in" in err
    assert "tokens/s" in err
    assert "seed 1" in err
    for stdin in (("--prompt=-",), ()):
        assert run("generate", *arguments, *stdin, stdin=b"abc")[:2] == (0, out)
    assert run("generate", *arguments, "--prompt=abc", "--echo")[1] == "abc" + out
    assert run("generate", *arguments, "--echo", stdin=b"abc")[1] == "abc" + out


@pytest.mark.slow
def test_generate_several_prompts(run, workdir):
    arguments = (f"--workdir={workdir}", "--max_tokens=12", "--temperature=0")
    alone = [run("generate", *arguments, f"--prompt={prompt}")[1] for prompt in ("abc", "longer prompt")]
    status, out, _ = run("generate", *arguments, "--prompt=abc", "--prompt=longer prompt")
    assert status == 0
    assert out == f"--- 1 of 2\n{alone[0]}--- 2 of 2\n{alone[1]}"


def test_generate_reads_once_and_asks_often(run, workdir):
    book = b"A book. " * 50
    arguments = (f"--workdir={workdir}", "--seed=1")
    status, out, err = run("generate", *arguments, "--max_tokens=0", "--save_state=book", stdin=book)
    assert (status, out) == (0, "\n")
    assert "memory at token 400" in err
    asked = [run("generate", *arguments, "--max_tokens=12", "--load_state=book", "--prompt=Who?") for _ in range(2)]
    whole = run("generate", *arguments, "--max_tokens=12", stdin=book + b"Who?")
    assert asked[0][:2] == asked[1][:2] == whole[:2]
    status, _, err = run("generate", *arguments, "--max_tokens=12", "--load_state=book")
    assert status == 0
    assert "memory at token 412" in err


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("evaluate", (), "--workdir is missing"),
        ("evaluate", ("--workdir=absent",), "--workdir=absent does not exist"),
        ("evaluate", ("--workdir=.",), "holds no run"),
        ("evaluate", ("--workdir=RUN", "--checkpoint=7"), "--checkpoint=7 does not exist"),
        ("evaluate", ("--workdir=RUN", "--data=absent.txt"), "--data='absent.txt' does not exist"),
        ("evaluate", ("--workdir=RUN", "--batch_size=many"), "batch_size"),
        ("evaluate", ("--workdir=RUN", "--batchsize=3"), "batch_size"),
        ("evaluate", ("--workdir=RUN", "text.txt"), "unexpected argument 'text.txt'"),
        ("generate", ("--prompt=a",), "--workdir is missing"),
        ("generate", ("--workdir=RUN",), "--prompt is missing"),
        ("generate", ("--workdir=RUN", "--prompt="), "--prompt is empty"),
        ("generate", ("--workdir=RUN", "--prompt=-", "--prompt=-"), "--prompt=- was given twice"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--top_p=0"), "--top_p=0.0 must be in (0, 1]"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--temperature=hot"), "temperature"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--load_state=absent"), "--load_state=absent cannot be read"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--prompt=b", "--save_state=s"), "a single --prompt"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--stop="), "--stop"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--save_state=absent/s"), "the folder absent does not exist"),
        ("generate", ("--workdir=RUN", "--prompt=a", "--save_state=."), "it is a folder"),
    ],
)
def test_a_mistake_gets_one_line(run, workdir, name, arguments, said):
    status, out, err = run(name, *(argument.replace("RUN", str(workdir)) for argument in arguments))
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_empty_standard_input(run, workdir):
    status, _, err = run("generate", f"--workdir={workdir}", stdin=b"")
    assert status == 2
    assert "error: the prompt is empty" in err
    status, _, err = run("generate", f"--workdir={workdir}", stdin=b"caf\xe9")
    assert status == 2
    assert "standard input is not UTF-8" in err


@pytest.mark.parametrize(("name", "smaller"), [("evaluate", "--batch_size"), ("generate", "fewer prompts")])
def test_out_of_memory_gets_one_line(run, workdir, monkeypatch, name, smaller):
    def too_large(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    for program in (evaluate_program, generate_program):
        monkeypatch.setattr(program, "load_model", too_large)
    status, _, err = run(name, f"--workdir={workdir}", *(["--prompt=a"] if name == "generate" else []))
    assert status == 2
    (line,) = err.splitlines()
    assert "out of memory" in line
    assert smaller in line


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_help(run, name):
    status, out, _ = run(name, "--help")
    assert status == 0
    assert f"python {name}.py" in out
    assert "--checkpoint" in out
