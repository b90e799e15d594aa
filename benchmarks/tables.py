"""What the results say: a table for each case, and the goals that the library was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

FIELDS = {"plain": "trained by likelihood alone", "rnode": "trained with RNODE's penalties"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
OURS, GUARDED = "cnfkit", "cnfkit, guarded default"


@dataclass(frozen=True)
class Table:
    """A table and the line above it, which may be empty."""

    caption: str
    headings: tuple[str, ...]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.headings, ["---"] + ["---:"] * (len(self.headings) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"*{self.caption}*\n\n{table}" if self.caption else table

    def text(self) -> str:
        lines = [self.headings, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.headings))]
        shown = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        return "\n".join([self.caption] * bool(self.caption) + shown)


def number(value: float) -> str:
    """Three digits, or two and a power of ten."""
    if not value or 1e-2 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(SUPERSCRIPTS)}"


def spread(timing: dict) -> str:
    """A median, and half the distance between the quartiles."""
    half = (timing["high"] - timing["low"]) / 2
    decimals = max(0, 2 - math.floor(math.log10(timing["ms"])))
    return f"{timing['ms']:.{decimals}f}\u00a0±\u00a0{half:.{decimals}f}"  # spaces at which no line ends


def times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def setting(value: float) -> str:
    """Numbers of steps are at least 1, tolerances are less."""
    return f"{value:.0f}\u00a0steps" if value >= 1 else number(value)


def threads(n: int | str) -> str:
    return f"{n} thread" if int(n) == 1 else f"{n} threads"


def named(rows: Iterable[dict], name: str) -> dict:
    """The line of that name."""
    return next(row for row in rows if row["name"] == name)


def fastest(rows: Iterable[dict], ours: bool) -> dict:
    """The fastest line of cnfkit, or of its peers, at the same error: the guarded default is left out."""
    same = (row for row in rows if row["name"].startswith(OURS) == ours and row["name"] != GUARDED)
    return min(same, key=lambda row: row["ms"])


def exponent(points: list[tuple[float, float]]) -> float:
    """The exponent of the power law through the middle one and the last of some points: 1 is proportional."""
    (x, y), (x_last, y_last) = points[len(points) // 2], points[-1]
    return math.log(y_last / y) / math.log(x_last / x)


def growth(memory: dict, kind: str) -> float:
    """By how many states the peak memory grows a step."""
    steps, peaks = memory["steps"], memory["peaks"][kind]
    return (peaks[-1] - peaks[-2]) / (steps[-1] - steps[-2]) / memory["state"]


def training(results: dict) -> list[Table]:
    tables, headline = [], str(results["threads"])
    for field, part in results["training"]["fields"].items():
        by_threads = part["threads"]
        zuko = named(by_threads[headline], "zuko")["ms"]
        others = [n for n in by_threads if n != headline]
        lines = []
        for row in sorted(by_threads[headline], key=lambda row: row["ms"]):
            lines.append(
                [
                    row["name"],
                    setting(row["setting"]),
                    str(row["evaluations"]),
                    number(row["error"]),
                    spread(row),
                    *(number(named(by_threads[n], row["name"])["ms"]) for n in others),
                    times(zuko / row["ms"]),
                ]
            )
        error = named(by_threads[headline], GUARDED)["solver_error"]
        caption = f"The field {FIELDS[field]}; the guarded default's solver error is {number(error)} nats"
        if part["unreached"]:
            caption += f"; that gradient error was not reached by {', '.join(part['unreached'])}"
        milliseconds = (f"ms, {threads(n)}" for n in (headline, *others))
        headings = ("", "setting", "evaluations", "gradient error", *milliseconds, "zuko's time over it")
        tables.append(Table(caption, headings, lines))
    return tables


def over_the_floor(results: dict) -> list[Table]:
    lines = []
    for n, rows in results["over_the_floor"]["threads"].items():
        floor = named(rows, "floor")["ms"]
        lines += [[f"{row['name']}, {threads(n)}", spread(row), f"{row['ms'] / floor:.2f}"] for row in rows]
    return [Table("", ("", "ms", "over the floor"), lines)]


def evaluation(results: dict) -> list[Table]:
    tables, n = [], f"{results['evaluation']['points']:,}".replace(",", " ")
    for field, parts in results["evaluation"]["fields"].items():
        for part, what in (("log_prob", "log-densities"), ("sample", "samples")):
            rows = sorted(parts[part], key=lambda row: row["ms"])
            best = fastest(rows, ours=False)["ms"]
            lines = [
                [row["name"], setting(row["setting"]), number(row["error"]), spread(row), times(best / row["ms"])]
                for row in rows
            ]
            headings = ("", "setting", "error", "ms", "best peer's time over it")
            tables.append(Table(f"{n} {what}, the field {FIELDS[field]}", headings, lines))
    return tables


def divergence(results: dict) -> list[Table]:
    rows, lines = results["divergence"]["rows"], []
    ours = named(rows, OURS)
    for row in rows:
        cells = [(spread(row[part]), times(row[part]["ms"] / ours[part]["ms"])) for part in ("forward", "both")]
        lines.append([row["name"], *cells[0], *cells[1]])
    return [Table("", ("", "forward, ms", "over cnfkit", "and backward, ms", "over cnfkit"), lines)]


def convolution(results: dict) -> list[Table]:
    rows = results["convolution"]["rows"]
    own = named(rows, "own tangents")["ms"]
    lines = [[row["name"], spread(row), times(row["ms"] / own)] for row in rows]
    return [Table("", ("", "ms", "over own tangents"), lines)]


def precision(results: dict) -> list[Table]:
    tables = []
    for task, rows in results["precision"].items():
        plain = named(rows, "float32")["ms"]
        lines = [[row["name"], number(row["error"]), spread(row), times(plain / row["ms"])] for row in rows]
        tables.append(Table(task, ("", "gradient, from float32's", "ms", "float32's time over it"), lines))
    return tables


def scaling(results: dict) -> list[Table]:
    tables = []
    for what, unit in (("batch", "point"), ("steps", "step")):
        rows = results["scaling"][f"by_{what}"]
        lines = [[str(row[what]), spread(row), number(1000 * row["ms"] / row[what])] for row in rows]
        tables.append(Table("", (what, "ms", f"µs a {unit}"), lines))
    return tables


def memory(results: dict) -> list[Table]:
    part = results["memory"]
    kinds = list(part["peaks"])
    lines = [[str(n), *(number(part["peaks"][kind][k] / 2**20) for kind in kinds)] for k, n in enumerate(part["steps"])]
    lines.append(["states a step, at the end", *(number(growth(part, kind)) for kind in kinds)])
    return [Table("", ("steps", *(f"{kind}, MiB" for kind in kinds)), lines)]


def reached(curve: list, target: float) -> float | None:
    """The seconds after which a run was first seen at its target; None if it never was."""
    return next((seconds for seconds, _, nll in curve if nll <= target), None)


def seeds(results: dict, density: str) -> dict[str, list[dict]]:
    """The runs on a density by name, one for each seed."""
    found: dict[str, list[dict]] = {}
    for key, run in results["train"]["runs"].items():
        where, _, name = key.split("/")
        if where == density:
            found.setdefault(name, []).append(run)
    return found


def train(results: dict) -> list[Table]:
    tables = []
    for density, target in results["train"]["targets"].items():
        lines = []
        for name, runs in seeds(results, density).items():
            first = [reached(run["curve"], target) for run in runs]
            taken = [
                f"≥ {number(run['curve'][-1][0])}" if seconds is None else number(seconds)
                for seconds, run in zip(first, runs, strict=True)
            ]
            ends = ", ".join(f"{run['curve'][-1][2]:.3f}" for run in runs)
            errors = ", ".join(number(run["solver_error"]) for run in runs if "solver_error" in run) or "–"
            lines.append([name, ", ".join(taken), ends, errors])
        caption = f"{density.replace('_', ' ').capitalize()}: to {target} nats"
        tables.append(Table(caption, ("", "seconds, each seed", "nats at the end", "solver error, nats"), lines))
    return tables


def _aims(results: dict) -> Iterator[tuple[str, str, float, float]]:
    """What, ``"≥"`` or ``"≤"``, the number wanted, the number measured."""
    headline = str(results["threads"])
    for field, part in results.get("training", {}).get("fields", {}).items():
        rows, where = part["threads"][headline], f"training iteration, {field}"
        zuko, ours = named(rows, "zuko")["ms"], fastest(rows, ours=True)["ms"]
        yield f"{where}: zuko over cnfkit", "≥", 4, zuko / ours
        yield f"{where}: best peer over cnfkit", "≥", 2.5, fastest(rows, ours=False)["ms"] / ours
        yield f"{where}: zuko over the guarded default", "≥", 9, zuko / named(rows, GUARDED)["ms"]
    if "over_the_floor" in results:
        rows = results["over_the_floor"]["threads"][headline]
        for trace, wanted in (("exact", 1.4), ("hutchinson", 1.2)):
            yield f"over the floor: {trace}", "≤", wanted, named(rows, trace)["ms"] / named(rows, "floor")["ms"]
    for field, parts in results.get("evaluation", {}).get("fields", {}).items():
        for part, what, wanted in (("log_prob", "log-densities", 4), ("sample", "samples", 5)):
            best, ours = (fastest(parts[part], ours=mine)["ms"] for mine in (False, True))
            yield f"{what}, {field}: best peer over cnfkit", "≥", wanted, best / ours
    if "divergence" in results:
        rows = results["divergence"]["rows"]
        for part, where in (("forward", "divergence"), ("both", "divergence and backward")):
            ours = named(rows, OURS)[part]["ms"]
            yield f"{where}: Hutchinson over exact", "≥", 1, named(rows, "cnfkit, Hutchinson")[part]["ms"] / ours
            yield f"{where}: zuko over cnfkit", "≥", 40, named(rows, "zuko")[part]["ms"] / ours
    if "convolution" in results:
        rows = results["convolution"]["rows"]
        ratio = named(rows, "autograd")["ms"] / named(rows, "own tangents")["ms"]
        yield "convolutions: autograd over own tangents", "≥", 1.3, ratio
    if "scaling" in results:
        for what in ("batch", "steps"):
            points = [(row[what], row["ms"]) for row in results["scaling"][f"by_{what}"]]
            yield f"time against {what}: exponent", "≤", 1.1, exponent(points)
    if "memory" in results:
        yield "memory, checkpointed: states a step", "≤", 1.1, growth(results["memory"], "checkpoint")
    if "train" in results:
        errors = [run["solver_error"] for run in results["train"]["runs"].values() if "solver_error" in run]
        yield "solver error after guarded training, nats", "≤", 0.01, max(errors, default=math.nan)


def goals(results: dict) -> list[Table]:
    """What the library should do, and whether it did."""
    lines = []
    for what, sense, wanted, measured in _aims(results):
        kept = measured >= wanted if sense == "≥" else measured <= wanted
        lines.append([what, f"{sense} {wanted:g}", number(measured), "yes" if kept else "no"])
    return [Table("", ("", "wanted", "measured", "kept"), lines)]


TABLES: dict[str, Callable[[dict], list[Table]]] = {
    f.__name__: f
    for f in (training, over_the_floor, evaluation, divergence, convolution, precision, scaling, memory, train)
}
