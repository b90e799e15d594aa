"""The numbers of the pages on choosing and on design: each is read from what benchmarks and chapters have written down.

A number stands in the page as ``[4.9]{#name}``, and a table between ``% table: name`` and ``% end: name``.
``python book/pages.py`` writes them; the tests hold the page to them, and to what it says in words.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("choosing", "design")
CLOCK = ("Flow++ couplings", "Glow", "FFJORD RNODE", "RealNVP", "FFJORD, vanilla", "i-ResNet", "Residual Flow")
PATHS = ("FFJORD", "RNODE", "OT-Flow", "CFM", "OT-CFM")
GRID = "8 steps of rk6"
CLAIMED_BITS = "these 'bits' are negative"
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import Table, exponent, growth, named, number, reached, seeds, times  # noqa: E402  (of the benchmarks)


@cache
def results(name: str) -> dict:
    """What ``bench``, ``train`` or ``choices`` measured."""
    folder = ROOT / "benchmarks" / ("" if name == "choices" else "results")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@cache
def outputs(chapter: str) -> list[dict]:
    """The outputs of a chapter, by its number."""
    (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def checked(chapter: str, claim: str) -> float:
    """The measured number of the only check of a chapter whose claim begins so."""
    records = [output.get("metadata", {}).get("cnfkit", {}).get("check") for output in outputs(chapter)]
    found = [record["measured"] for record in records if record and record["claim"].startswith(claim)]
    if len(found) != 1:
        raise ValueError(f"chapter {chapter} has {len(found)} checks that begin with {claim!r}; wanted one")
    return found[0]


def printed_lines(chapter: str) -> list[str]:
    """What a chapter printed."""
    text = "".join("".join(output["text"]) for output in outputs(chapter) if output.get("name") == "stdout")
    return text.splitlines()


def printed(chapter: str, start: str) -> list[float]:
    """The numbers after the start of the only line that a chapter printed which begins so."""
    lines = [line for line in printed_lines(chapter) if re.match(rf"\s*{re.escape(start)}\s*\b", line)]
    if len(lines) != 1:
        raise ValueError(f"chapter {chapter} printed {len(lines)} lines that begin with {start!r}; wanted one")
    return [float(value) for value in re.findall(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", lines[0].split(start, 1)[1])]


def found(chapter: str, pattern: str) -> list[tuple[float, ...]]:
    """The numbers in the groups of a pattern, for each line that a chapter printed which begins so; one at least."""
    matches = [re.match(rf"\s*{pattern}", line) for line in printed_lines(chapter)]
    if not any(matches):
        raise ValueError(f"chapter {chapter} printed no line that begins like {pattern!r}")
    return [tuple(map(float, match.groups())) for match in matches if match]


def matched(name: str) -> tuple[float, ...]:
    """A row of the five flows of chapter 20: nats above the truth, evaluations for a density, the paths' detour."""
    return found("20", rf"{name} +(\S+) +\de-\d\d +(\d+) +\S+ +(\S+)$")[0]


def euler(name: str) -> float:
    """How far one Euler step misses the samples of one of them."""
    return found("20", rf"{name} +(\d+\.\d{{3}}) +\d+\.\d{{3}} +\d+\.\d{{3}} *$")[0][0]


def leaked(name: str) -> str:
    """The share of its samples, in per cent, that fell where the truth has nearly none."""
    ((share,),) = found("20", rf"{name} +(\d+) % ")
    return f"{share:.0f}"


def unpaired(dimension: int) -> str:
    """What groups of 64 leave of the surplus length of independent lines, in per cent."""
    ((*_, share),) = found("20", rf"surplus that is left, +{dimension}-d" + 4 * r" +(\S+)")
    return f"{100 * share:.0f}"


def iteration(name: str, key: str = "ms", field: str = "plain") -> float:
    """A training iteration of the benchmarks, on a field that was trained by likelihood alone or as RNODE."""
    part = results("bench")
    return named(part["training"]["fields"][field]["threads"][str(part["threads"])], name)[key]


def evaluation(name: str, key: str = "ms", what: str = "log_prob", field: str = "plain") -> float:
    """Ten thousand log-densities, or samples."""
    return named(results("bench")["evaluation"]["fields"][field][what], name)[key]


def divergence(name: str, part: str = "both") -> float:
    """One evaluation of the divergence in 43 dimensions."""
    return named(results("bench")["divergence"]["rows"], name)[part]["ms"]


def gradient(name: str, key: str = "ms") -> float:
    """A way to differentiate a solve."""
    return named(results("choices")["gradients"]["rows"], name)[key]


def trace(dimension: int, name: str) -> float:
    """The time with the exact trace over that with Hutchinson's."""
    rows = [row for row in results("choices")["traces"]["rows"] if (row["dimension"], row["name"]) == (dimension, name)]
    exact, estimate = (next(row["ms"] for row in rows if row["trace"] == kind) for kind in ("exact", "hutchinson"))
    return exact / estimate


def penalised(kind: str) -> float:
    """The time of an iteration with RNODE's penalties over that without, with the exact trace or Hutchinson's."""
    rows = results("choices")["penalties"]["rows"]
    return named(rows, f"{kind}, with")["ms"] / named(rows, f"{kind}, without")["ms"]


def model(name: str, part: str) -> float:
    """A density or a sample of each of the points, or a training iteration."""
    return named(results("choices")["models"]["rows"], name)[part]["ms"]


def seconds(density: str, name: str) -> list[float | None]:
    """The seconds of training until a run reached its target, for each seed; None if it did not."""
    target = results("train")["targets"][density]
    return [reached(run["curve"], target) for run in seeds({"train": results("train")}, density)[name]]


def middle(density: str, name: str) -> float:
    """The median over the seeds; infinite where it was not reached."""
    return statistics.median(float("inf") if value is None else value for value in seconds(density, name))


def faster_after_matching() -> list[str]:
    """The densities on which a warm start by flow matching was the faster one."""
    names = "cnfkit, flow matching first", "cnfkit"
    return [d for d in results("train")["targets"] if middle(d, names[0]) < middle(d, names[1])]


def rough(value: float) -> str:
    """One digit: a decimal fraction, or a power of ten."""
    return re.sub(r"(\d)\.\d·", r"\1·", number(value)) if value < 1e-2 else f"{value:g}"


def traces() -> Table:
    kinds = ("two hidden layers", "three hidden layers", "PotentialField", "any module, by autograd")
    dimensions = sorted({row["dimension"] for row in results("choices")["traces"]["rows"]})
    lines = [[kind, *(times(trace(d, kind)) for d in dimensions)] for kind in kinds]
    return Table("", ("exact over estimated", *(f"d = {d}" for d in dimensions)), lines)


def solvers() -> Table:
    ours = {
        "cnfkit, frozen grid": "a frozen grid, rk6",
        "cnfkit, rk6, uniform grid": "rk6, equal steps",
        "cnfkit, dopri5, uniform grid": "dopri5, equal steps",
        "cnfkit, rk4, uniform grid": "rk4, equal steps",
        "cnfkit, adaptive": "adaptive",
    }
    lines = [
        [shown, str(iteration(name, "evaluations")), f"{iteration(name):.0f}", f"{iteration(name, field='rnode'):.0f}"]
        for name, shown in ours.items()
    ]
    return Table("", ("steps", "evaluations", "ms, plain field", "ms, RNODE's field"), lines)


def tolerances() -> Table:
    rows = {
        f"{tolerance:.0e}": printed("13", f"within {tolerance:.0e}:") for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    }
    lines = [[rough(float(name)), f"{values[0]:.0f}", rough(values[1])] for name, values in rows.items()]
    return Table("", ("tolerance", "evaluations", "solver error, nats"), lines)


def gradients() -> Table:
    lines = [
        [row["name"], f"{row['ms']:.0f}", number(row["peak"] / 2**20), number(row["error"])]
        for row in results("choices")["gradients"]["rows"]
    ]
    return Table("", ("gradient", "ms", "peak, MiB", "gradient error"), lines)


def penalties() -> Table:
    lines = []
    for start, shown in (("0    ", "0"), ("0.01 ", "0.01"), ("0.03", "0.03"), ("0.1 ", "0.1"), ("0.3 ", "0.3")):
        lines.append([shown, *_likelihoods(printed("18", start))])
    lines.append(["0, guarded grid", *_likelihoods(printed("18", "0, guarded"))])
    lines.append(["0.01, guarded grid", *_likelihoods(printed("18", "0.01, guarded"))])
    return Table("", ("weight", "reported, nats", "true, nats", "solver error", "evaluations"), lines)


def _likelihoods(values: list[float]) -> list[str]:
    reported, true, error, evaluations, *_ = values
    return [f"{reported:.2f}", f"{true:.2f}", rough(error), f"{evaluations:.0f}"]


def models() -> Table:
    lines = []
    for row in results("choices")["models"]["rows"]:
        taken = [number(row[part]["ms"]) for part in ("density", "sample", "iteration")]
        lines.append([row["name"], f"{row['parameters']:,}".replace(",", " "), *taken])
    return Table("", ("flow", "parameters", "densities, ms", "samples, ms", "training, ms"), lines)


def fits() -> Table:
    lines = []
    for density in ("two_moons", "eight_gaussians", "pinwheel", "checkerboard"):
        gaps = printed("13", f"{density:<18}FFJORD")
        lines.append([density.replace("_", " "), *(f"{gap:.2f}" for gap in gaps)])
    return Table("", ("nats above the truth", "FFJORD", "RealNVP", "a mixture, by EM"), lines)


def paths() -> Table:
    lines = []
    for name in PATHS:
        gap, evaluations, detour = matched(name)
        lines.append([name, f"{gap:.2f}", f"{evaluations:.0f}", f"{detour:.2f}", f"{euler(name):.2f}"])
    return Table("", ("", "nats above the truth", "evaluations", "detour", "one step off by"), lines)


def bits(name: str) -> float:
    """Of a flow of chapter 19, in bits/dim, the mean over its two seeds."""
    return sum(found("19", rf"{re.escape(name)} +(\d\.\d{{3}}) +(\d\.\d{{3}})")[0]) / 2


def clock() -> Table:
    lines = []
    for name in CLOCK:
        spent = found("19", rf"{re.escape(name)} +\d+, \d+ +(\d+) +(\d+) +([\d.]+) +([\d.]+)")[0]
        images, _, density, sample = spent
        seen = f"{images:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
        lines.append([name, f"{bits(name):.2f}", seen, number(density), number(sample)])
    return Table("", ("", "bits/dim", "images seen", "a density, ms", "a sample, ms"), lines)


def starts() -> Table:
    lines = []
    for density in results("train")["targets"]:
        cold, warm = (middle(density, f"cnfkit{name}") for name in ("", ", flow matching first"))
        lines.append([density.replace("_", " "), number(cold), number(warm)])
    return Table("", ("seconds to the target", "by likelihood", "flow matching first"), lines)


def costs() -> Table:
    def scaled(what: str) -> str:
        points = [(row[what], row["ms"]) for row in results("bench")["scaling"][f"by_{what}"]]
        return f"power {exponent(points):.2f}"

    def multiplied(name: str) -> str:
        return f"power {abs(checked('12', f'power of d in the multiplications: {name}')):.2f}"

    def states(kind: str) -> str:
        return f"{number(growth(results('bench')['memory'], kind))} states"

    most, points = "most evaluations over fewest, whatever the", "evaluations of a solve"
    lines = [
        [points, "1 to 4000 points", f"{checked('13', f'{most} batch'):.1f}× at most"],
        [points, "2 to 128 dimensions", f"{checked('13', f'{most} dimension'):.1f}× at most"],
        [points, "a thousandth of the tolerance", times(checked("13", "evaluations for a thousandth"))],
        [points, "training, on the pinwheel", times(checked("13", "pinwheel: evaluations at the end over"))],
        [points, "∫‖z̈‖² of strong swirls", f"power {checked('17', 'from a = 4 on, evaluations grow'):.2f}"],
        ["multiplications of a determinant", "the dimension", multiplied("determinant")],
        ["multiplications of an exact trace", "the dimension", multiplied("exact trace")],
        ["multiplications of Hutchinson's estimate", "the dimension", multiplied("Hutchinson")],
        ["multiplications of a trace, two hidden layers", "the dimension", multiplied("identity")],
        ["time of a training iteration", "the batch", scaled("batch")],
        ["time of a training iteration", "the steps", scaled("steps")],
        ["memory, backpropagation", "a step", states("backprop")],
        ["memory, checkpointing", "a step", states("checkpoint")],
        ["memory, adjoint", "a step", f"{checked('10', 'adjoint: bytes a step'):.0f} bytes"],
        ["passes for a sample of MAF", "64 dimensions", f"{checked('08', 'MAF in 64 dimensions: a sample'):.0f}"],
    ]
    return Table("", ("what", "against", "measured"), lines)


def free_gains() -> list[float]:
    """What FFJORD gains on a RealNVP of its size, on each density."""
    names = ("two_moons", "eight_gaussians", "pinwheel", "checkerboard")
    return [checked("13", f"{name}: nats that FFJORD gains") for name in names]


def larger_gains() -> float:
    """What the larger field of chapter 13 gains on the checkerboard: what both gain on the mixture."""
    behind = checked("13", "checkerboard: nats that the mixture gains")
    return behind + checked("13", "checkerboard: nats that the flow gains on the mixture")


TABLES: dict[str, Callable[[], Table]] = {
    f.__name__: f
    for f in (traces, solvers, tolerances, gradients, penalties, models, fits, clock, paths, starts, costs)
}
NUMBERS: dict[str, Callable[[], str]] = {
    "estimate-over-exact": lambda: times(divergence("cnfkit, Hutchinson") / divergence("cnfkit")),
    "autograd-over-exact": lambda: times(divergence("torchdiffeq") / divergence("cnfkit")),
    "one-probe": lambda: f"{printed('13', ' 1 probes: off by')[0]:.1f}",
    "sixteen-probes": lambda: f"{printed('13', '16 probes: off by')[0]:.1f}",
    "trained-with-one-probe": lambda: f"{checked('13', 'nats that training with one probe cost'):.2f}",
    "trained-with-one-probe-wide": lambda: f"{checked('12', 'nats that the noise cost, of 64 dimensions'):.1f}",
    "fresh-noise": lambda: f"{checked('12', 'evaluations with fresh noise over those without'):.0f}",
    "gradient-error": lambda: number(results("bench")["training"]["below"]),
    "frozen-over-adaptive": lambda: times(iteration("cnfkit, adaptive") / iteration("cnfkit, frozen grid")),
    "guarded-error": lambda: number(iteration("cnfkit, guarded default", "solver_error")),
    "guarded-ms": lambda: f"{iteration('cnfkit, guarded default'):.0f}",
    "exploited-reported": lambda: f"{printed('18', '0    ')[0]:.2f}",
    "exploited-true": lambda: f"{printed('18', '0    ')[1]:.2f}",
    "jitter-sees": lambda: f"{printed('18', 'unguarded moved steps:')[0]:.2f}",
    "more-steps-see": lambda: f"{printed('18', 'unguarded more  steps:')[0]:.2f}",
    "grid-steps": lambda: f"{evaluation('cnfkit, rk6, uniform grid', 'setting'):.0f}",
    "adaptive-over-grid": lambda: times(evaluation("cnfkit") / evaluation("cnfkit, rk6, uniform grid")),
    "sampling-over-density": lambda: times(evaluation("cnfkit") / evaluation("cnfkit", what="sample")),
    "torchdiffeq-over-ours": lambda: times(gradient("torchdiffeq, backprop") / gradient("adaptive, backprop")),
    "checkpoint-over-backprop": lambda: times(gradient(f"{GRID}, checkpoint") / gradient(f"{GRID}, backprop")),
    "checkpoint-memory": lambda: times(gradient(f"{GRID}, backprop", "peak") / gradient(f"{GRID}, checkpoint", "peak")),
    "checkpoint-adaptive": lambda: times(gradient("adaptive, checkpoint") / gradient("adaptive, backprop")),
    "adjoint-over-backprop": lambda: times(gradient("adaptive, adjoint") / gradient("adaptive, backprop")),
    "adjoint-memory": lambda: times(gradient("adaptive, backprop", "peak") / gradient("adaptive, adjoint", "peak")),
    "penalties-exact": lambda: f"{100 * (penalised('exact') - 1):.0f}",
    "penalties-hutchinson": lambda: f"{100 * (penalised('hutchinson') - 1):.0f}",
    "honest-cost": lambda: f"{checked('18', 'nats that it costs against the guarded grid'):.2f}",
    "both-guards-save": lambda: f"{100 * (1 - checked('18', 'evaluations with it over those without')):.0f}",
    "both-guards-cost": lambda: f"{checked('18', 'nats that λ = 0.01 costs on the guarded grid'):.2f}",
    "honest-seconds": lambda: f"{checked('18', 'seconds: four steps, both, over the guarded grid'):.2f}",
    "honest-behind": lambda: f"{checked('18', 'nats that the guarded grid is ahead by then'):.2f}",
    "jacobian-saves": lambda: f"{100 * (1 - checked('18', 'guarded, jacobian: evaluations over')):.0f}",
    "jacobian-cost": lambda: f"{checked('18', 'four steps, jacobian: nats lost'):.2f}",
    "kinetic-cost": lambda: f"{printed('18', 'four    kinetic')[0]:.2f}",
    "models-points": lambda: str(results("choices")["models"]["points"]),
    "models-dimension": lambda: str(results("choices")["models"]["dimension"]),
    "ffjord-lead": lambda: f"{checked('13', 'nats that FFJORD gains at equal size'):.2f}",
    "ffjord-lead-longer": lambda: f"{checked('13', 'nats that FFJORD gains on the best'):.2f}",
    "time-spread": lambda: f"{checked('13', 'nats between the best and the worst'):.2f}",
    "matching-over-likelihood": lambda: times(
        model("cnf", "iteration") / results("choices")["models"]["matching"]["ms"]
    ),
    "matching-wins": lambda: str(len(faster_after_matching())),
    "matching-tried": lambda: str(len(results("train")["targets"])),
    "leaked-pairs": lambda: leaked("OT-CFM"),
    "leaked-lines": lambda: leaked("CFM"),
    "leaked-likelihood": lambda: leaked("FFJORD"),
    "pairs-2": lambda: unpaired(2),
    "pairs-8": lambda: unpaired(8),
    "pairs-32": lambda: unpaired(32),
    "warm-unguarded": lambda: f"{printed('20', 'CFM, no guard')[1]:.2f}",
    "warm-penalties": lambda: f"{printed('20', 'CFM, penalties alone')[1]:.2f}",
    "warm-guarded": lambda: f"{printed('20', 'CFM, guard')[1]:.2f}",
    "half-loses": lambda: f"{checked('06', 'bits/dim that the best half loses'):.2f}",
    "scales-gain": lambda: f"{checked('06', 'bits/dim gained on the best with one scale'):.2f}",
    "draws-gain": lambda: f"{checked('06', 'bits/dim that 32 draws gain'):.2f}",
    "rnode-seconds": lambda: f"{printed('19', 'seconds, RNODE over vanilla')[0]:.2f}",
    "own-tangents": lambda: times(
        named(results("bench")["convolution"]["rows"], "autograd")["ms"]
        / named(results("bench")["convolution"]["rows"], "own tangents")["ms"]
    ),
    # of the page on design
    "spike-bits": lambda: f"−{-checked('06', CLAIMED_BITS):.1f}",
    "start-saves": lambda: "{:.1f}".format(printed("15", "0.001")[0] - printed("15", "0.001")[1]),
    "unstarted-bits": lambda: f"{checked('07', 'grey levels, no start: bits per number at first'):,.0f}".replace(
        ",", " "
    ),
    "elementwise-loses": lambda: f"{checked('03', 'nats that the elementwise flow loses'):.2f}",
    "one-matrix": lambda: f"{checked('03', 'nats lost with one matrix more'):.3f}",
    "learned-on-reversed": lambda: f"{checked('07', 'patches: bits/dim that learning gains on reversal'):.2f}",
    "learned-on-rotations": lambda: f"{checked('07', 'patches: bits/dim that it gains on rotations'):.2f}",
    "linear-straight": lambda: f"{-checked('04', 'straight: nats that linear layers gain'):.2f}",
    "linear-turned": lambda: f"{checked('04', 'turned: nats that linear layers gain'):.2f}",
    "rigid-loses": lambda: f"{checked('05', 'two moons: nats by which NICE without scales loses'):.2f}",
    "scales-gain-moons": lambda: f"{checked('05', 'two moons: nats that the scales gain'):.2f}",
    "by-depth": lambda: ", ".join(
        f"{printed('05', f'couplings: {k}, nats above the truth:')[0]:.2f}" for k in (1, 2, 3, 4, 8)
    ),
    "depth-stored": lambda: f"{checked('05', '16 times as deep: factor in memory, stored'):.1f}",
    "depth-reversible": lambda: f"{checked('05', '16 times as deep: factor in memory, reversible'):.1f}",
    "larger-gains": lambda: f"{larger_gains():.2f}",
    "larger-asks": lambda: times(checked("13", "checkerboard: evaluations over those of the smaller field")),
    "latent-poor": lambda: f"{checked('03', 'worst less best latent, K = 1'):.3f}",
    "latent-rich": lambda: f"{checked('03', 'worst less best latent, K = 5'):.3f}",
    "radial-gains": lambda: f"{checked('14', 'nats that the radial map gains'):.0f}",
    "hyper-gains": lambda: f"{checked('16', 'nats that it gains on: CNF, concatenated'):.2f}",
    "free-gains": lambda: " to ".join(f"{end(free_gains()):.2f}" for end in (min, max)),
    "free-best": lambda: f"{checked('13', 'nats that FFJORD gains on the best'):.2f}",
    "colours-lead": lambda: f"{found('14', r'RealNVP +[0-9]+ +[0-9.]+ +([+-][0-9.]+)')[0][0]:.2f}",
    "columns-behind": lambda: f"{-found('14', r'RealNVP +[0-9]+ +[0-9.]+ +([+-][0-9.]+)')[1][0]:.1f}",
    "glow-less-free": lambda: f"{abs(checked('15', 'bits/dim, Glow less free')):.2f}",
    "realnvp-ahead": lambda: f"{-checked('15', 'bits/dim, RealNVP less free'):.2f}",
    "free-time": lambda: times(model("cnf", "density") / model("realnvp", "density")),
    "mixture-ahead": lambda: str(sum(float(row[3]) < float(row[1]) for row in fits().rows)),
    "error-by-rows": lambda: f"{checked('14', 's.e. by rows over the true one'):.2f}",
}


# What the page says in words, and the condition under which it may.
CLAIMS: dict[str, Callable[[], bool]] = {
    "is no dearer than its estimate, whatever the dimension": lambda: all(
        trace(d, "two hidden layers") < 1.2 for d in (2, 8, 32, 128)
    ),
    "a deeper `MLPField`, or a `PotentialField`, up to ten dimensions or so": lambda: (
        max(trace(8, "three hidden layers"), trace(8, "PotentialField")) < 2 < trace(32, "three hidden layers")
    ),
    "any other module, up to three dimensions or so": lambda: (
        trace(2, "any module, by autograd") < 1.6 < 2 < trace(8, "any module, by autograd")
    ),
    "Of equal steps those of order 6 cost least": lambda: all(
        iteration("cnfkit, rk6, uniform grid", field=field)
        < min(iteration(f"cnfkit, {method}, uniform grid", field=field) for method in ("dopri5", "rk4"))
        for field in ("plain", "rnode")
    ),
    "so the estimate of the error costs next to nothing": lambda: (
        iteration("cnfkit, frozen grid") < 1.1 * iteration("cnfkit, rk6, uniform grid")
    ),
    "the numbers are the same, so the gradient is": lambda: all(
        abs(gradient(f"{solve}, checkpoint", "error") / gradient(f"{solve}, backprop", "error") - 1) < 0.01
        for solve in (GRID, "adaptive")
    ),
    "but backpropagation within a tenth of that tolerance is more accurate still, and takes less time": lambda: (
        gradient("a tenth of the tolerance, backprop", "error")
        < gradient("adaptive, adjoint", "error")
        < gradient("adaptive, backprop", "error")
        and gradient("a tenth of the tolerance, backprop") < gradient("adaptive, adjoint")
    ),
    "With 0.03 the four steps can be believed": lambda: printed("18", "0.03")[2] <= 0.02,
    "one pass of their networks either way": lambda: all(
        model(name, part) < model("cnf", part) for name in ("realnvp", "glow") for part in ("density", "sample")
    ),
    "`maf` samples one coordinate after the other, and IAF evaluates so": lambda: (
        model("maf", "sample") > 5 * model("maf", "density") and model("iaf", "density") > 5 * model("iaf", "sample")
    ),
    "FFJORD and a RealNVP of as many parameters": lambda: all(float(row[1]) < float(row[2]) for row in fits().rows),
    "EM takes seconds, and was ahead of the small FFJORD on": lambda: (
        found("14", r"mixture +[0-9]+ +[0-9.]+ +([+-][0-9.]+)")[0][0] < 0
    ),
    "RealNVP of twice the size": lambda: -checked("15", "bits/dim, RealNVP less free") > 0.03,
    "Glow of the same size": lambda: abs(checked("15", "bits/dim, Glow less free")) < 0.02,
    "the batch and the dimension hardly do": lambda: (
        max(checked("13", f"most evaluations over fewest, whatever the {what}") for what in ("batch", "dimension")) < 2
    ),
    "it was still": lambda: checked("13", "nats that FFJORD gains on the best") > 0.02,
    "take the Jacobian energy": lambda: (
        checked("18", "guarded, jacobian: evaluations over") < 0.85
        and checked("18", "four steps, jacobian: nats lost") < 0.05 < checked("18", "four steps, kinetic alone")
    ),
    "for the best likelihood, whatever a density costs later": lambda: (
        min(PATHS, key=lambda name: matched(name)[0]) == "FFJORD"
    ),
    "It has the straightest paths, is the cheapest to solve": lambda: all(
        min(PATHS, key=lambda name, k=k: matched(name)[k]) == "OT-CFM" for k in (1, 2)
    ),
    "The price is the largest detour of all": lambda: max(PATHS, key=lambda name: matched(name)[2]) == "CFM",
    "Moved steps hardly find that out": lambda: (
        printed("18", "unguarded moved steps:")[0] < printed("18", "unguarded more  steps:")[0] / 3
    ),
}


def render(page: str) -> str:
    """The page with these tables and numbers."""

    def table(match: re.Match) -> str:
        return f"% table: {match[1]}\n\n{_known(TABLES, match[1])().markdown()}\n\n% end: {match[1]}"

    def value(match: re.Match) -> str:
        return f"[{_known(NUMBERS, match[1])()}]{{#{match[1]}}}"

    page = re.sub(r"^% table: (\w+)\n.*?^% end: \1$", table, page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\[[^][]*\]\{#([\w-]+)\}", value, page)


def _known(known: dict[str, Callable], name: str) -> Callable:
    if name not in known:
        raise ValueError(f"the page has {name!r}; wanted one of {', '.join(known)}")
    return known[name]


def write() -> None:
    """Bring the pages up to date."""
    for page in PAGES:
        path = ROOT / "book" / f"{page}.md"
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
