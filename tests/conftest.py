import os

# Before torch is imported, here and in every child process: two cores are shared by everything that runs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("AUTOACCUM_MALLOC", None)

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is here"))
