"""TensorBoard as a user sees it: its real server on a real run, looked at with a real browser."""

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from phase2_jax.data.config import DataConfig
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.training import loop
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS
from phase2_jax.training.config import CheckpointConfig, ExperimentConfig, TrainConfig
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.train import train

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser on this machine (looked for {', '.join(BROWSERS)})"),
]
STEPS, STEPS_PER_EPOCH, KEPT, RESUMED_TO = 8, 4, 4, 6
# A busy machine is slow to start a server and a browser; nothing waits this long unless it fails.
PATIENCE = 60.0
# TensorBoard's elements hide their contents in shadow roots.
WALK = """
function* everything(node) {
  yield node;
  if (node.shadowRoot) yield* everything(node.shadowRoot);
  if (!['STYLE', 'SCRIPT'].includes(node.tagName)) for (const child of node.childNodes) yield* everything(child);
}
const all = [...everything(document.body)];
"""
TEXT = WALK + "all.filter(n => n.nodeType === 3).map(n => n.nodeValue.trim()).filter(t => t).join('\\n')"


class Page:
    """One page of a headless browser, spoken to through the pipe of its debugging protocol."""

    def __init__(self, profile: Path):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        # The protocol uses file descriptors 3 (to the browser) and 4 (from it).
        command = f'exec "$0" {options} --window-size=1500,1000 --user-data-dir="$1" about:blank 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(BROWSER), str(profile)],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._pending = b""
        self._count = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._pending:
                received = os.read(self._read, 1 << 20)
                assert received, "the browser closed its pipe"
                self._pending += received
            answer, self._pending = self._pending.split(b"\0", 1)
            content = json.loads(answer)
            if content.get("id") == self._count:
                assert "error" not in content, content
                return content["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a script's last expression, promises awaited."""
        result = self.call("Runtime.evaluate", expression=f"{{{script}}}", returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def wait_for(self, script: str, *wanted: str) -> str:
        """Evaluate `script` until its text holds all that is wanted; returns that text."""
        deadline = time.monotonic() + PATIENCE
        while True:
            text = str(self.evaluate(script) or "")
            missing = [part for part in wanted if part not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"{missing} did not appear in:\n{text}"
            time.sleep(0.3)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._write)
        os.close(self._read)


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard's server on a free port; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", "--port=0", "--host=127.0.0.1"]
    with (logdir.parent / "server.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE
            while not (found := re.search(r"http://\S+", (logdir.parent / "server.log").read_text())):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait(PATIENCE)


def experiment(folder: Path) -> ExperimentConfig:
    (folder / "text.txt").write_text("What the memory wrote yesterday it forgets today.\n" * 40)
    return ExperimentConfig(
        model=ModelConfig(
            d_model=8, num_layers=2, num_heads=2, head_dim=4, ffn_dim=8, consolidation=ConsolidationConfig(interval=8)
        ),
        data=DataConfig(path=str(folder / "text.txt")),
        train=TrainConfig(num_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH, batch_size=2, seq_len=16),
        checkpoint=CheckpointConfig(every_steps=KEPT, every_epochs=1),
        logging=LoggingConfig(batch_every=1, sample_tokens=16),
    )


def power_cut(*_: Any) -> None:
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A server on the files of a run that was killed after its second epoch and resumed from its checkpoint of step 4,
    only to fail at step 6, before the second epoch's validation came round again.
    """
    folder = tmp_path_factory.mktemp("tensorboard")
    config = experiment(folder)
    train(config, folder / "runs" / "x")
    for path in [*(folder / "runs" / "x" / CHECKPOINTS).iterdir(), *(folder / "runs" / "x" / BEST).iterdir()]:
        if path.name.isdigit() and int(path.name) > KEPT:
            shutil.rmtree(path)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=RESUMED_TO))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(shorter, folder / "runs" / "x")
    with tensorboard(folder / "runs") as url:
        yield url


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def test_dashboard_opens_on_gamma_loss_and_perplexity(address: str, page: Page) -> None:
    page.open(f"{address}#custom_scalars")
    text = page.wait_for(TEXT, "Γ (forgetting rate)", "Γ per layer", "Loss and perplexity", "SNR per layer", "Memory")
    assert text.index("Γ (forgetting rate)") < text.index("Loss and perplexity") < text.index("Memory")
    # A curve for each of the two layers; batch, training and validation loss; both perplexities.
    wait = WALK + "all.filter(n => n.nodeType === 3 && /Matches|^\\(\\d+\\)/.test(n.nodeValue))"
    # Each chart is filled when its own data arrives.
    shown = "Matches (2),Matches (1),Matches (3),Matches (2)"
    matches = page.wait_for(wait + ".map(n => n.nodeValue.replace(/\\s+/g, ' ').trim()).join(',')", shown)
    assert matches.startswith(shown)
    assert len(page.screenshot()) > 20_000


def test_resuming_left_no_doubled_and_no_orphan_points(address: str, page: Page) -> None:
    page.open(f"{address}#scalars")
    page.wait_for(TEXT, "batch", "gamma", "val")

    def steps(tag: str) -> list[int]:
        query = f"{address}data/plugin/scalars/scalars?tag={tag}&run=x%2Ftensorboard"
        return [point[1] for point in page.evaluate(f"fetch({json.dumps(query)}).then(answer => answer.json())")]

    for tag in ("batch/loss", "batch/gamma_mean", "gamma/layer_0", "gamma/layer_1", "snr/layer_1"):
        assert steps(tag) == list(range(1, RESUMED_TO + 1))
    for tag in ("train/loss", "train/perplexity", "val/loss", "val/perplexity"):
        assert steps(tag) == [STEPS_PER_EPOCH]


def test_histograms_of_every_layer_are_drawn(address: str, page: Page) -> None:
    page.open(f"{address}#histograms")
    page.wait_for(TEXT, "gamma_histogram/layer_0", "gamma_histogram/layer_1")
    drawn = WALK + "String(all.filter(n => n.tagName === 'path' && (n.getAttribute('d') || '').length > 40).length)"
    deadline = time.monotonic() + PATIENCE
    # One for each of two layers.
    while int(page.evaluate(drawn) or 0) < 2:
        assert time.monotonic() < deadline, "no histogram was drawn"
        time.sleep(0.3)


def test_heat_map_is_shown(address: str, page: Page) -> None:
    page.open(f"{address}#images")
    page.wait_for(TEXT, "gamma_heatmap")
    widths = WALK + "all.filter(n => n.tagName === 'IMG').map(n => n.naturalWidth).join(',')"
    deadline = time.monotonic() + PATIENCE
    while not any(int(width or 0) > 500 for width in str(page.evaluate(widths)).split(",")):
        assert time.monotonic() < deadline, "the heat map was not loaded"
        time.sleep(0.3)


def test_hyperparameters_and_results_are_in_the_table(address: str, page: Page) -> None:
    page.open(f"{address}#hparams")
    page.wait_for(TEXT, "model.d_model", "optimizer.learning_rate", "val/loss", "x/tensorboard")


def test_sample_text_and_configuration_can_be_read(address: str, page: Page) -> None:
    page.open(f"{address}#text")
    page.wait_for(TEXT, "sample_text", "The model continues:", "hyperparameters", "model.num_layers")
