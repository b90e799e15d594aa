"""What every test run shares: the environment of the kernels, how nbval compares a notebook, the names in examples."""

import math
import os
import tempfile
from pathlib import Path

import pytest

# Kernels inherit these. One thread and one device, because sums in another order have other digits;
# `setdefault`, so that CNFKIT_DEVICE=cuda reaches the notebooks too.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "CNFKIT_DEVICE": "cpu",
    "CNFKIT_LIVE": "0",
    "CNFKIT_PROGRESS": "0",
    "PYTHONHASHSEED": "0",
}.items():
    os.environ.setdefault(name, value)


def pytest_configure(config):
    try:
        from nbval.plugin import metadata_tags
    except ImportError:  # the library can be tested without notebooks
        return
    # Cells tagged `volatile` show timings and device names: they run, and are never compared.
    metadata_tags["volatile"] = metadata_tags["nbval-ignore-output"]
    if not config.option.nbval_sanitize_with:
        # From the root, since a path in `addopts` would depend on where pytest is started.
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "nbval_sanitize.cfg")


@pytest.fixture(autouse=True)
def names_in_examples(request):
    """What the examples in docstrings use without importing it."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import torch

    import cnfkit

    namespace = request.getfixturevalue("doctest_namespace")
    namespace |= {name: getattr(cnfkit, name) for name in cnfkit.__all__}
    namespace |= {"Path": Path, "math": math, "nn": torch.nn, "tempfile": tempfile, "torch": torch}
    torch.manual_seed(0)  # examples draw points where any will do
