"""Settings every test shares."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Tests run each program a few times on small arrays: compiling it, not running it, is what takes time. Without LLVM's
# optimisation and with the older emitters of fused loops it takes a tenth of it. Read when jax starts, which ends at
# once on a flag it does not know; later versions have the new emitters alone. The first one acts on GPUs, too, where a
# program with the gradient of a whole model then did not end.
CHEAP_COMPILATION = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    CHEAP_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CHEAP_COMPILATION}"
# Programs that several tests, or the processes they start, compile alike are compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="phase2-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging as absl_logging  # noqa: E402
from hypothesis import settings  # noqa: E402

# Tests repeat exactly: the examples are derived from the test itself, none are remembered between runs, and no deadline
# depends on how busy the machine is (the first example of each shape compiles).
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The programs, run in a test's own process, turn absl's and with it the root's logging down for good."""
    root, handler = logging.getLogger(), absl_logging.get_absl_handler()
    level, verbosity, installed = root.level, absl_logging.get_verbosity(), handler in root.handlers
    yield
    absl_logging.set_verbosity(verbosity)
    root.setLevel(level)
    if not installed:
        root.removeHandler(handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="JAX finds no GPU"))
