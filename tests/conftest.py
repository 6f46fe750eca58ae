import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)                  # the same speed everywhere, and bit-identical sums


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: trains for a while; leave out with -m "not slow"')
