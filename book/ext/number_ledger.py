"""``{numbers-ledger} GROUP``: what a paper reports, what was measured here, and the gap.

The paper's number is typed, with its citation. Ours is read when the book is built: from the checks and the printed
lines of the chapters, the results of the benchmarks, and what the files of weights say about their training.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import ledger
import run_times
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(ledger.ROOT / "book"))

from measured import checked, printed, printed_lines  # of the book

HEADINGS = ("What", "Paper", "Ours", "Gap", "Trained in", "Where")
NOT_COMPARABLE = "other data and size"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """A number of a paper and ours; ``gap`` is computed, or says why there is none.

    Attributes:
        chapter: its number, or ``"benchmarks"``.
        weights: the pattern of the files of weights that the number is about, if it took any.
    """

    what: str
    paper: str
    ours: Callable[[], str]
    gap: Callable[[], str] | str
    chapter: str
    weights: str = ""


def signed(value: float, digits: int = 2) -> str:
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown if shown.strip("+−0.") else "0"


def power(chapter: str, claim: str, paper: float) -> tuple[Callable[[], str], Callable[[], str]]:
    """A measured exponent, and how far it is from the paper's."""
    return (
        lambda: f"power {checked(chapter, claim):.2f}".replace("-", "−"),
        lambda: signed(checked(chapter, claim) - paper),
    )


def equal(chapter: str, claim: str, paper: float, words: str = "{:g}") -> tuple[Callable[[], str], Callable[[], str]]:
    """A measured number, and how far it is from the paper's."""
    return (
        lambda: words.format(checked(chapter, claim)),
        lambda: signed(checked(chapter, claim) - paper),
    )


def mnist_bits() -> float:
    """Of FFJORD on MNIST at full size: validation images."""
    return printed("15", "validation")[0]


def passes(name: str, sample: int, density: int) -> tuple[Callable[[], str], Callable[[], str]]:
    """Network passes in 64 dimensions for a sample and a density, and how far they are from what is claimed."""
    found = [lambda what=what: checked("08", f"{name} in 64 dimensions: a {what}") for what in ("sample", "density")]
    return (
        lambda: " and ".join(f"{value():.0f}" for value in found),
        lambda: f"{abs(found[0]() - sample) + abs(found[1]() - density):.0f}",
    )


SAME = [
    Row(
        "ticks and crosses of Table 1, twelve models",
        "48 {cite}`grathwohl2019`",
        lambda: f"{checked('08', 'ticks of 48 that agree'):.0f} agree",
        lambda: f"{48 - checked('08', 'ticks of 48 that agree'):.0f}: {differing()}",
        "08",
        "08_*",
    ),
    Row(
        "FFJORD, MNIST at 28 × 28: bits/dim",
        "0.99 {cite}`grathwohl2019`",
        lambda: f"{mnist_bits():.2f} on validation images",
        lambda: f"{signed(mnist_bits() - 0.99)}; a smaller field, minutes of training",
        "15",
        "15_mnist_0",
    ),
    Row(
        "MAF, $d = 64$: passes for a sample, and for a density",
        "$d$ and 1 {cite}`papamakarios2017`",
        *passes("MAF", 64, 1),
        "08",
    ),
    Row(
        "IAF, $d = 64$: passes for a sample, and for a density",
        "1 and $d$ {cite}`kingma2016`",
        *passes("IAF", 1, 64),
        "08",
    ),
]
CLAIMS = [
    Row(
        "log-determinant, multiplications against $d$: by elimination",
        "$O(d^3)$ {cite}`chen2018`",
        *power("12", "power of d in the multiplications: determinant", 3),
        "12",
    ),
    Row(
        "exact trace of a free-form field",
        "$O(d^2)$ {cite}`grathwohl2019`",
        *power("12", "power of d in the multiplications: exact trace", 2),
        "12",
    ),
    Row(
        "Hutchinson's estimate, beside the field",
        "$O(d)$ {cite}`grathwohl2019`",
        *power("12", "power of d in the multiplications: Hutchinson", 1),
        "12",
    ),
    Row(
        "trace of a planar field",
        "$O(d)$ {cite}`chen2018`",
        *power("11", "power of d in those of the closed form", 1),
        "11",
    ),
    Row(
        "adjoint: bytes that a step more keeps",
        "0 {cite}`chen2018`",
        *equal("10", "adjoint: bytes a step", 0),
        "10",
    ),
    Row(
        "reversible blocks: memory, 16 times as deep",
        "1× {cite}`gomez2017`",
        *equal("05", "16 times as deep: factor in memory, reversible", 1, "{:.2f}×"),
        "05",
    ),
    Row(
        "order of Dormand and Prince's method",
        "5 {cite}`dormand1980`",
        *equal("09", "order of dopri5", 5, "{:.1f}"),
        "09",
    ),
    Row(
        "evaluations for a sample, most over fewest, random fields in 2 to 128 dimensions",
        "one pass {cite}`grathwohl2019`",
        *equal("13", "most evaluations over fewest, whatever the dimension", 1, "{:.2f}×"),
        "13",
    ),
]
OTHER = [
    Row(
        "parameters: a residual network over the neural ODE that fits as well",
        "2.7× (0.60 and 0.22 million, MNIST) {cite}`chen2018`",
        lambda: f"{checked('09', 'parameters of four blocks, which fit as well'):.1f}× (two spirals)",
        NOT_COMPARABLE,
        "09",
        "09_*",
    ),
    Row(
        "RNODE's price in likelihood",
        "−0.001 bits/dim (MNIST) {cite}`finlay2020`",
        lambda: f"{signed(checked('18', 'nats that λ = 0.01 costs on the guarded grid'))} nats (pinwheel)",
        NOT_COMPARABLE,
        "18",
        "18_guarded*",
    ),
    Row(
        "RNODE's saving: time, or evaluations, over those without penalties",
        "0.36× the hours (24.37 of 68.47, MNIST) {cite}`finlay2020`",
        lambda: f"{checked('18', 'evaluations with it over those without'):.2f}× the evaluations (pinwheel)",
        NOT_COMPARABLE,
        "18",
        "18_guarded*",
    ),
    Row(
        "the same at a smaller size",
        "0.36× the hours, −0.001 bits/dim (28 × 28) {cite}`finlay2020`",
        lambda: (
            f"{printed('19', 'seconds, RNODE over vanilla')[0]:.2f}× the seconds, "
            f"{signed(-statistics.mean(leads()), 3)} bits/dim (14 × 14)"
        ),
        lambda: f"{signed(printed('19', 'seconds, RNODE over vanilla')[0] - 24.37 / 68.47)} of the time, other size",
        "19",
        "19_rnode_*",
    ),
    Row(
        "RNODE with four steps of RK4: are they enough?",
        "yes, weights of 0.01 (MNIST) {cite}`finlay2020`",
        lambda: (
            f"solver error {checked('18', 'solver error of four steps at λ = 0.03'):.2f} nats "
            f"with 0.03, {printed('18', '0.01 ')[2]:.1f} with 0.01 (pinwheel)"
        ),
        NOT_COMPARABLE,
        "18",
        "18_rnode*",
    ),
    Row(
        "−ELBO of a VAE: Gaussian posterior, less FFJORD's",
        "3.73 nats (86.55 less 82.82, MNIST) {cite}`grathwohl2019`",
        lambda: " and ".join(signed(gain) for gain in elbo_gains()) + " nats (halves of digits, two seeds)",
        NOT_COMPARABLE,
        "16",
        "16_halves_*",
    ),
]
# The table of Finlay and others, MNIST at 28 × 28: bits per dimension, and hours where they are given.
IMAGES = {
    "realnvp": ("RealNVP", "1.06"),
    "glow": ("Glow", "1.05"),
    "iresnet": ("i-ResNet", "1.05"),
    "residual": ("Residual Flow", "0.970"),
    "ffjord": ("FFJORD", "0.974, 68.47 h"),
    "rnode": ("RNODE", "0.973, 24.37 h"),
}
MISSING = [
    ("FFJORD, CIFAR-10: bits/dim", "3.40 {cite}`grathwohl2019`", "5 days or more"),
    ("FFJORD, CIFAR-10, trained again: bits/dim", "3.363 {cite}`finlay2020`", "91.33 h"),
    ("RNODE, CIFAR-10: bits/dim", "3.398 {cite}`finlay2020`", "31.84 h"),
    ("RNODE, ImageNet at 64 × 64: bits/dim", "3.723 {cite}`finlay2020`", "64.07 h"),
    ("FFJORD, five tables: nats", "{doc}`quoted in chapter 14 <../notebooks/14_ffjord_tabular>`", "not given"),
]
"""What no machine of ours ran: what, the paper's number, and the paper's time."""


def elbo_gains() -> list[float]:
    """What a CNF gains on a Gaussian posterior, for each seed."""
    lines = [
        line for line in printed_lines("16") if line[:1].isdigit() and line.split()[1:2] in (["Gaussian"], ["CNF"])
    ]
    values = {(line.split()[0], line.split()[1]): float(line.split()[3]) for line in lines}
    return [values[seed, "Gaussian"] - values[seed, "CNF"] for seed in sorted({seed for seed, _ in values})]


def leads() -> list[float]:
    """By how much RNODE is ahead of vanilla FFJORD in chapter 19, for each seed."""
    return [printed("19", f"seed {seed}: vanilla less RNODE")[0] for seed in (0, 1)]


def differing() -> str:
    """The models whose ticks differ from those of the paper."""
    (line,) = (line for line in printed_lines("08") if line.startswith("the one that differs:"))
    return ", ".join(re.findall(r"'(.+?)'", line)) + ", whose samples take one pass here"


def images() -> list[Row]:
    """The rows of chapter 19."""
    rows = []
    for name, (shown, paper) in IMAGES.items():
        files = sorted((ledger.ROOT / "benchmarks" / "results" / "some_numbers").glob(f"{name}_[0-9].json"))
        bits = [json.loads(path.read_text(encoding="utf-8"))["bits"] for path in files]
        rows.append(
            Row(
                f"{shown}: bits/dim",
                f"{paper} (28 × 28) {{cite}}`finlay2020`",
                lambda bits=bits: f"{statistics.mean(bits):.2f} (14 × 14)",
                "other size",
                "19",
                f"19_{name}_*",
            )
        )
    return rows


def trained(pattern: str) -> str:
    """How long the training of these weights took, and on what."""
    seconds = run_times.trained(pattern)[1]
    return ", ".join(f"{taken / 60:.0f} min, {device}" for device, taken in sorted(seconds.items())) or "–"


def where(chapter: str) -> str:
    """A link to where a number comes from."""
    (path,) = (ledger.ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    return f"{{doc}}`{chapter} </notebooks/{path.stem}>`"


def markdown(group: str) -> str:
    """The table of a group."""
    if group == "missing":
        lines = [[what, paper, took, NOT_RUN] for what, paper, took in MISSING]
        headings = ("What", "Paper", "Its time", "Ours")
    else:
        rows = {"same": SAME, "claims": CLAIMS, "other": OTHER + images()}[group]
        lines = [
            [row.what, row.paper, row.ours(), row.gap if isinstance(row.gap, str) else row.gap()]
            + ([trained(row.weights)] if group != "claims" else [])
            + [where(row.chapter)]
            for row in rows
        ]
        headings = HEADINGS if group != "claims" else tuple(name for name in HEADINGS if name != "Trained in")
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


class NumbersLedger(SphinxDirective):
    """One of the tables: ``same``, ``claims``, ``other``, ``missing``."""

    required_arguments = 1

    def run(self):
        for path in (ledger.ROOT / "notebooks").glob("*.ipynb"):
            self.env.note_dependency(str(path))
        for path in (ledger.ROOT / "benchmarks" / "results" / "some_numbers").glob("*.json"):
            self.env.note_dependency(str(path))
        box = nodes.container(classes=["checks-ledger-box", "numbers-ledger"])
        text = markdown(self.arguments[0]).splitlines()
        self.state.nested_parse(StringList(text, source=self.env.docname), self.content_offset, box)
        return [box]


def setup(app):
    app.add_directive("numbers-ledger", NumbersLedger)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
