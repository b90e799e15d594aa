"""The column "measured" of README's table of numbers, read from what the chapters printed and checked.

``python book/pages.py`` writes it; a test holds the README to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from measured import CLOCK, PATHS, ROOT, bits, checked, found, outputs

README = ROOT / "README.md"
ROW = re.compile(r"^\| (?P<what>.+) \| (?P<cell>.+) \| chapter (?P<chapter>\d\d) \|$", re.MULTILINE)
PENALTIES = ("neither", "kinetic", "jacobian", "both")
DENSITIES = ("two_moons", "eight_gaussians", "pinwheel", "checkerboard")


def each(chapter: str, pattern: str, names: Iterable[str], which: int = 0, group: int = 0) -> list[float]:
    """A number for each name: of the lines that begin with the name and the pattern, the one with that index."""
    return [found(chapter, re.escape(name) + pattern)[which][group] for name in names]


def shown(values: Iterable[float], digits: int = 2, unit: str = "") -> str:
    return ", ".join(f"{value:.{digits}f}{unit}" for value in values)


def power(value: float) -> str:
    return re.sub(r"e-0?", "e-", f"{value:.0e}")


def volumes() -> str:
    rigid, scaled, affine, _ = found("05", r"moons +(\S+) +(\S+) +(\S+) +(\S+)")[-1]
    floor = affine + checked("05", "two moons: nats that the floor is above a single Gaussian")
    return f"{shown((rigid, scaled))}; {floor:.2f}"


def multiscale() -> str:
    error = max(
        record["measured"]
        for output in outputs("06")
        if (record := output.get("metadata", {}).get("cnfkit", {}).get("check"))
        and record["claim"] == "standard error of the bits/dim"
    )
    bits = each("06", r" +(\S+)", ("RealNVP, two scales, 1 draw ", "RealNVP, two scales, 32 draws"))
    return f"{shown(bits)} (± {error:.2f})"


def comet() -> str:
    names = ("cnfkit dopri5", "torchdiffeq dopri5", "scipy RK45 (dopri5)")
    (equal,) = each("09", r" +(\d+)", ["cnfkit rk4, equal steps"])
    return ", ".join((shown(each("09", r" +(\d+)", names), 0), f"{round(equal, -3):,.0f}".replace(",", " ")))


def gradients() -> str:
    names = [f"{name}, tolerance 1e-5" for name in ("backpropagation", "checkpointing", "adjoint")]
    errors = each("10", r" +(\S+) +\d+ +\d+ +(\S+)", names)
    memory = each("10", r" +(\S+) +\d+ +\d+ +(\S+)", names, group=1)
    return f"{', '.join(map(power, errors))}; {shown(memory[:1], 1)}, {shown(memory[1:])}"


def ways() -> str:
    names = ("Gaussian", "planar", "IAF", "CNF, concatenated", "CNF, low rank", "CNF, hypernetwork")
    return shown(each("16", r" +(\S+) ±", names))


def seeds() -> str:
    likelihoods, evaluations = zip(*found("17", r"seed \d +(\S+) +(\d+) \(\d+\)"), strict=True)
    nll, calls = ((min(values), max(values)) for values in (likelihoods, evaluations))
    return f"{nll[0]:.2f} to {nll[1]:.2f}; {calls[0]:.0f} to {calls[1]:.0f}"


def fixed(weight: str) -> tuple[str, str, str]:
    reported, true, _, evaluations = found("18", rf"{re.escape(weight)} +(\S+) +(\S+) +(\S+) +(\d+)")[0]
    return f"{reported:.2f}", f"{true:.2f}", f"{evaluations:.0f}"


# How a row's first column begins, and its second column.
ROWS: dict[str, Callable[[], str]] = {
    "two moons, eight Gaussians, pinwheel, checkerboard: a mixture": lambda: shown(
        found("02", rf"{name} +.+ (\d\.\d+)$")[0][0] for name in ("moons", "gaussians", "pinwheel", "checkerboard")
    ),
    "held-out digits in a file": lambda: shown(
        each("02", r" +(\S+)", ("rANS, mixture of histograms", "xz, all in one", "zip, all in one", "PNG, all in one")),
        1,
    ),
    "an elementwise flow on a pair": lambda: shown(
        (checked("03", "nats that the elementwise flow loses"), -math.log(1 - 0.8**2) / 2), 3
    ),
    "two moons, each conditional": lambda: "; ".join(
        (
            shown(found("04", r"two moons, 5 Gaussians +(\S+) +(\S+)")[0]),
            shown(found("04", r"two moons, 1 Gaussian +(\S+) +(\S+)")[0]),
            shown(each("04", r" first: floor ([\d.]+)", ("x₁", "x₂"))),
        )
    ),
    "four pairs of moons": lambda: "; ".join(
        shown(found("04", rf"{name} +(\S+) +(\S+)")[0]) for name in ("straight", "turned")
    ),
    "two moons, NICE": volumes,
    "two moons, RealNVP of 8 layers": lambda: shown([checked("06", "nats that RealNVP is from the best possible")]),
    "digits of 8 × 8 pixels, RealNVP with two scales": multiscale,
    "the same digits by a model that knows nothing": lambda: shown(
        each("06", r" +(\S+) bits/dim", ("knows nothing", "histogram of each pixel"))
    ),
    "RealNVP with one scale": lambda: shown(
        each("06", r" +(\S+) bits/dim", ("RealNVP, checkerboard", "RealNVP, top half"))
    ),
    "photographs in patches": lambda: shown(
        each("07", r" +(\S+) ±", ("reversed", "shuffled", "random rotation", "learned"), which=-1)
    ),
    "the same patches": lambda: shown(
        (
            found("07", r"patches, a normal distribution +(\S+)")[0][0],
            found("07", r"patches (\S+) ± \S+ bits/dim")[0][0],
        )
    ),
    "the digits by PixelCNN": lambda: "; ".join(
        (
            shown(each("08", r" +([\d.]+) +\S+ +\d+$", ["PixelCNN"])),
            shown(each("08", r" +≤ (\S+)", ("VAE", "MAF", "RealNVP", "Glow", "FFJORD"))),
        )
    ),
    "ticks of FFJORD's Table 1": lambda: f"{checked('08', 'ticks of 48 that agree'):.0f} of 48",
    "two spirals, three seeds": lambda: shown(each("09", r" +(\d+)", ("the limit", "4 blocks")), 0),
    "a comet's year to 1e-6": comet,
    "gradient of a trained FFJORD": gradients,
    "digits as 64 numbers": lambda: shown(each("12", r" +(\S+) ±", ("flow", "noisy")), 1),
    "FFJORD with 4 872 parameters": lambda: "; ".join(
        shown(each("13", r" +FFJORD (\S+), RealNVP (\S+),", DENSITIES, group=group)) for group in (0, 1)
    ),
    "a larger FFJORD": lambda: "; ".join(
        shown(each("13", r" +(\S+) +\S+ +(\S+) ± \S+ +\S+ s$", [DENSITIES[k] for k in (0, 2, 3)], group=group))
        for group in (1, 0)
    ),
    "colours of pixels": lambda: shown(
        each("14", r" +\d+ +(\S+)", ("Gaussian", "RealNVP", "MAF", "FFJORD", "mixture"))
    ),
    "63 columns of patches": lambda: "; ".join(
        (
            shown(each("14", r" +\d+ +(\S+)", ["Gaussian"], which=1), 1),
            shown(each("14", r" +\d+ +(\S+)", ["radial"]), 1),
            shown(each("14", r" +\d+ +(\S+)", ("FFJORD", "MAF", "RealNVP"), which=1), 1),
        )
    ),
    "a pixel from its neighbours": lambda: shown(found("14", r"[\d.]+ to +\d\d+\.\d +(\d+)% +(\d+)%")[-1], 0, " %"),
    "digits by FFJORD with 46 000 parameters": lambda: shown(each("15", r" +(\S+) ±", ("free", "Glow", "RealNVP"))),
    "two numbers from their noisy product": ways,
    "pinwheel by likelihood alone, five seeds": seeds,
    "the cheapest of them behind a swirl": lambda: shown(found("17", r"cheapest, stirred +\S+ +(\d+)")[0], 0),
    "pinwheel, trained with four Runge–Kutta steps": lambda: ", ".join(fixed("0")[:2]),
    "the same with RNODE's penalties": lambda: ", ".join(fixed("0.03")),
    "trained on a grid that an error estimate chooses": lambda: ", ".join(fixed("0, guarded")[1:]),
    "the penalties apart on such a grid": lambda: shown(
        each("18", r" +\S+ ± \S+ +(\d+)", [f"guarded {terms}" for terms in PENALTIES]), 0
    ),
    "the same by four steps": lambda: shown(each("18", r" +\+?(\S+) ± ", [f"four    {terms}" for terms in PENALTIES])),
    "kinetic energy over that of the optimal transport": lambda: "; ".join(
        f"{detour:.2f} × {waste:.2f}"
        for weight in ("λ = 0, guarded", "λ = 0.1")
        for detour, waste in found("18", rf"{weight} +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+)")
    ),
    "MNIST at 14 × 14, five to eight minutes": lambda: "; ".join(
        (
            shown(bits(name) for name in CLOCK),
            shown(found("19", r"deviation from training to training (\S+)")[0]),
        )
    ),
    "the same images by xz": lambda: shown(
        each("19", r" +\d+ kB +(\S+)", ("xz, all in one", "PNG, all in one", "zip, all in one")), 1
    ),
    "pinwheel by FFJORD, RNODE, OT-Flow": lambda: "; ".join(
        shown(each("20", r" +(\S+) +\de-\d\d +(\d+) +\S+ +\S+$", PATHS, group=group), digits)
        for group, digits in ((0, 2), (1, 0))
    ),
    "flow matching, then 500 batches": lambda: shown(
        each("20", r" +\S+ +(\S+)", ("CFM, guard", "CFM, penalties alone", "CFM, no guard"))
    ),
}


def render(text: str) -> str:
    """The README with what was measured."""

    def row(match: re.Match) -> str:
        named = [cell for start, cell in ROWS.items() if match["what"].startswith(start)]
        if len(named) != 1:
            raise ValueError(f"the README has a row {match['what']!r}, which {len(named)} entries of ROWS begin")
        return f"| {match['what']} | {named[0]()} | chapter {match['chapter']} |"

    return ROW.sub(row, text)


def write() -> None:
    """Bring the README up to date."""
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
