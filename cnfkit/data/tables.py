"""Tables: the five of the MAF and FFJORD papers from their public files, and three that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnfkit.data import uci

SHIPPED = ("wine", "breast_cancer", "diabetes")
TABLES = (*uci.PREPARED, *SHIPPED)

# What Papamakarios, Pavlakou and Murray report: rows for training, validation and test, and columns
PUBLISHED = {
    "power": (1_659_917, 184_435, 204_928, 6),
    "gas": (852_174, 94_685, 105_206, 8),
    "hepmass": (315_123, 35_013, 174_987, 21),
    "miniboone": (29_556, 3_284, 3_648, 43),
    "bsds300": (1_000_000, 50_000, 250_000, 63),
}


@dataclass(frozen=True)
class Table:
    """Rows of continuous columns, to fit a density to.

    Attributes:
        name: which one.
        columns: what the columns are called.
        train: shape ``(n, columns)``, dtype float32.
        validation: held-out rows, likewise, for choices.
        test: held-out rows, likewise, for the last measurement only.
        train_target: what goes with each row: classes, shape ``(n,)`` and dtype int64, or a standardised number, shape
            ``(n, 1)`` and dtype float32; None where there is nothing.
        validation_target: likewise.
        test_target: likewise.

    >>> cancer = table("breast_cancer")
    >>> cancer.train.shape, cancer.train_target.bincount()  # malignant and benign
    (torch.Size([365, 24]), tensor([136, 229]))
    """

    name: str
    columns: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    train_target: Tensor | None = None
    validation_target: Tensor | None = None
    test_target: Tensor | None = None


def table(name: str, folder: str | Path | None = None) -> Table:
    """A table by name, cleaned, split and standardised.

    ``"power"``, ``"gas"``, ``"hepmass"``, ``"miniboone"`` and ``"bsds300"`` are prepared as by Papamakarios, Pavlakou
    and Murray, *Masked autoregressive flow for density estimation*, 2017, in appendix D.2 and in their published code:
    FFJORD and most papers since compare on them. Their sizes are checked. Two things cannot be had as they were: the
    quarter of GAS's rows, drawn without a seed (here it has one), and the noise on the time of day in POWER.

    ``"wine"``, ``"breast_cancer"`` and ``"diabetes"`` ship with scikit-learn. A fifth of their rows is for the test and
    a fifth of the others for validation, in a fixed split; the training rows have mean 0 and variance 1. Their targets
    are three cultivars, malignant (0) or benign (1), and the progression of the disease.

    Columns whose least value occurs more than five times have no density, and are left out. The diabetes table keeps
    some that a flow must not be trusted with as they are: whole numbers, such as the age, and ``s2``, a function of
    ``s1``, ``s3`` and ``s5`` but for rounding (Friedewald's formula).

    Args:
        name: one of these.
        folder: where the files are. Unless given, a folder of that name in ``CNFKIT_DATA``, else in
            ``~/.cache/cnfkit``, and what is missing is downloaded: up to 0.9 GB for HEPMASS and BSDS300, which share
            an archive in the folder ``maf``.

    Raises:
        ValueError: if the name is unknown, a file is damaged, or the table has not the published size.
        FileNotFoundError: if a file is not in the folder that was given.
        ConnectionError: if a file is missing, and no mirror gives it.
        OSError: if a downloaded file cannot be written.
        ImportError: if BSDS300 is wanted, and h5py is not installed.

    >>> wine = table("wine")
    >>> wine.train.shape, wine.validation.shape, wine.test.shape
    (torch.Size([115, 13]), torch.Size([28, 13]), torch.Size([35, 13]))
    """
    if name not in TABLES:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(TABLES)}")
    if name in SHIPPED:
        return _shipped(name)
    columns, *parts = uci.PREPARED[name](folder)
    size = (*map(len, parts), len(columns))
    if size != PUBLISHED[name]:
        raise ValueError(
            f"{name} has {size[0]}, {size[1]} and {size[2]} rows of {size[3]} columns; wanted {PUBLISHED[name]}, as "
            "published: is a file another one?"
        )
    return Table(name, tuple(columns), *(torch.from_numpy(part.astype(np.float32)) for part in parts))


def _shipped(name: str) -> Table:
    from sklearn import datasets  # here, because it takes seconds to import

    bundle = getattr(datasets, f"load_{name}")(**{"scaled": False} if name == "diabetes" else {})
    keep = uci.continuous(bundle.data)
    order = torch.randperm(len(bundle.data), generator=torch.Generator().manual_seed(0)).numpy()
    rows = uci.standardised(*uci.split(bundle.data[order][:, keep], 5), by=1)
    targets = uci.split(bundle.target[order].reshape(-1, 1), 5)
    if bundle.target.dtype.kind == "f":
        targets = [torch.from_numpy(part).float() for part in uci.standardised(*targets, by=1)]
    else:
        targets = [torch.from_numpy(part[:, 0]).long() for part in targets]
    columns = tuple(str(column) for column in np.array(bundle.feature_names)[keep])
    return Table(name, columns, *(torch.from_numpy(part).float() for part in rows), *targets)
