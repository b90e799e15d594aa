"""The names that the examples in docstrings use without importing them."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import cnfkit


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace):
    doctest_namespace |= {name: getattr(cnfkit, name) for name in cnfkit.__all__}
    doctest_namespace |= {"Path": Path, "math": math, "nn": nn, "tempfile": tempfile, "torch": torch}
    torch.manual_seed(0)  # examples draw points where any will do
