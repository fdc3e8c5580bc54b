import os
import tempfile

import matplotlib
import torch

os.environ.setdefault("OTSEG_CACHE", tempfile.mkdtemp(prefix="otseg-cache-"))

matplotlib.use("Agg")
torch.set_num_threads(1)  # the models of the tests are small: more threads only get in each other's way


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes over ten seconds; leave out with -m 'not slow'")
