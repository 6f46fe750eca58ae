import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

torch.set_num_threads(1)                  # the same speed everywhere, and bit-identical sums


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: trains for a while; leave out with -m "not slow"')


@pytest.fixture
def few_shapes(monkeypatch):
    """`--dataset shapes` with 300 training and 100 test images: whole runs in a second or two."""
    everything = common._shapes
    monkeypatch.setattr(common, "_shapes", lambda size: everything(size, train=300, test=100))


@pytest.fixture
def two_threads():
    """For the tests that train a default run."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
