"""check(): one line when a claim holds, the numbers when it does not, and what the ledger is given."""

import json
import math

import pytest
import torch

import cnfkit.checks
from cnfkit import CheckFailed, check

LINES = [
    (dict(measured=3e-9, below=1e-6), "✓ c: measured 3e-09, below 1e-06"),
    (dict(measured=1 / 3, below=1), "✓ c: measured 0.33, below 1"),
    (dict(measured=0, below=1), "✓ c: measured 0, below 1"),
    (dict(measured=-math.inf, below=-20), "✓ c: measured -inf, below -20"),
    (dict(measured=1 / 3, above=0.25), "✓ c: measured 0.3333, above 0.25"),
    (dict(measured=math.inf, above=10), "✓ c: measured inf, above 10"),
    (dict(measured=1e-50, above=0), "✓ c: measured 1e-50, above 0"),
    (dict(measured=0.1, within=(0, 0.1)), "✓ c: measured 0.1, within [0, 0.1]"),
    (dict(measured=-1.5, within=[-2, -1]), "✓ c: measured -1.5, within [-2, -1]"),
    (dict(measured=True, above=0), "✓ c: measured 1, above 0"),
    (dict(measured=torch.tensor(7), within=(7, 7)), "✓ c: measured 7, within [7, 7]"),
    (dict(measured=[0.1, 0.2], below=0.3), "✓ c: measured 0.2, below 0.3"),
    (dict(measured=torch.tensor([1e-3, -5.0]), below=0.1, equation="eq-x"), "✓ c: measured 0.001, below 0.1 (eq-x)"),
    (dict(measured=torch.ones(2, 2, requires_grad=True), above=0.5), "✓ c: measured 1, above 0.5"),
]
FAILURES = [
    (dict(measured=0.25, below=0.1), "✗ c: measured 0.25, wanted below 0.1"),
    (dict(measured=0.1, below=0.1), "✗ c: measured 0.1, wanted below 0.1"),
    (dict(measured=1.0, above=1), "✗ c: measured 1, wanted above 1"),
    (dict(measured=math.pi, within=(0, 3), equation="eq-pi"), "✗ c: measured 3.142, wanted within [0, 3] (eq-pi)"),
    (dict(measured=math.inf, below=math.inf), "✗ c: measured inf, wanted below inf"),
    (
        dict(measured=torch.tensor([1.0, 9.0, 5.0, 0.0]), below=2),
        "✗ c: measured 9, wanted below 2; 2 of 4 entries fail",
    ),
    (dict(measured=torch.tensor([1.0, 9.0, -5.0]), above=2), "✗ c: measured -5, wanted above 2; 2 of 3 entries fail"),
    (dict(measured=[0.5, 4.0], within=(0, 1)), "✗ c: measured 4, wanted within [0, 1]; 1 of 2 entries fail"),
    (dict(measured=[0.0, math.nan], below=1), "✗ c: measured nan, wanted below 1; 1 of 2 entries fail"),
]


@pytest.mark.parametrize(("arguments", "line"), LINES, ids=[line for _, line in LINES])
def test_a_claim_that_holds_is_one_line(capsys, arguments, line):
    assert check("c", **arguments) is None
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(("arguments", "line"), FAILURES, ids=[line for _, line in FAILURES])
def test_a_claim_that_fails_shows_its_numbers(capsys, arguments, line):
    with pytest.raises(CheckFailed) as failed:
        check("c", **arguments)
    assert str(failed.value) == line and isinstance(failed.value, AssertionError)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bound", [dict(below=1), dict(above=-1), dict(within=(-1, 1)), dict(below=math.inf)])
@pytest.mark.parametrize("measured", [math.nan, torch.tensor([0.0, math.nan])], ids=["number", "tensor"])
def test_nan_satisfies_no_bound(measured, bound):
    with pytest.raises(CheckFailed, match="measured nan"):
        check("c", measured, **bound)


@pytest.mark.parametrize("bound", [dict(below=math.nan), dict(above=math.nan)])
def test_a_bound_that_is_nan_is_satisfied_by_nothing(bound):
    with pytest.raises(CheckFailed):
        check("c", 0.0, **bound)


@pytest.mark.parametrize(
    ("bounds", "came"),
    [({}, "none"), (dict(below=1, above=0), "below and above"), (dict(above=0, within=(0, 1)), "above and within")],
)
def test_exactly_one_bound(bounds, came):
    with pytest.raises(ValueError, match=f"check 'c': wanted exactly one of below, above, within; got {came}"):
        check("c", 0.5, **bounds)


def test_a_bound_of_zero_is_a_bound():
    check("c", -1, below=0)
    check("c", 1, above=0)


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [
        (dict(measured=1.23456e-7, below=1e-6, equation="eq-a"), ("below 1e-06", "below", "eq-a", 1.235e-7)),
        (dict(measured=torch.tensor([2.0, 3.0]), above=1), ("above 1", "above", None, 2.0)),
        (dict(measured=0.5, within=(0, 1)), ("within [0, 1]", "within", None, 0.5)),
    ],
)
def test_in_a_kernel_the_ledger_is_given_the_record(monkeypatch, capsys, arguments, bound):
    shown = []
    monkeypatch.setattr(cnfkit.checks, "in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    check("a claim", **arguments)
    ((data, options),) = shown
    record = options["metadata"]["cnfkit"]["check"]
    assert (record["bound"], record["kind"], record["equation"], record["measured"]) == bound
    assert record["claim"] == "a claim" and set(record) == {"claim", "equation", "measured", "bound", "kind"}
    assert json.loads(json.dumps(options["metadata"])) == options["metadata"]
    assert options["raw"] is True and list(data) == ["text/plain"] and data["text/plain"].startswith("✓ a claim: ")
    assert capsys.readouterr().out == ""
