import matplotlib
import pytest
import torch

matplotlib.use("agg")  # no window, whatever the machine


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Modules draw their weights from the global generator."""
    torch.manual_seed(0)
