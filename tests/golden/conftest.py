"""Numbers computed with the original PyTorch code; data/README.md says what they are."""

from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


def _load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return dict(file)


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    return _load("model_weights.npz")


@pytest.fixture(scope="session")
def activations() -> dict[str, np.ndarray]:
    return _load("model_activations.npz")


@pytest.fixture(scope="session")
def resolvents() -> dict[str, np.ndarray]:
    return _load("resolvent.npz")


@pytest.fixture(scope="session")
def zeta_numbers() -> dict[str, np.ndarray]:
    return _load("zeta.npz")
