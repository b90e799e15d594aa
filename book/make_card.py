"""Write the card of the published weights, README.md in their folder, from what the files say about themselves.

python book/make_card.py [FOLDER]
"""

import re
import sys
from collections import Counter
from itertools import groupby
from math import prod
from pathlib import Path

import cnfkit as ck

FOLDER = Path(__file__).parents[1] / "notebooks" / "checkpoints"
HEAD = """\
# Weights that were trained once

*Made by `python book/make_card.py` from the files; a test holds it to them.*

What a chapter cannot train while its reader waits is here. `ck.trained` loads a file, if its sha256 is the one in
`SHA256SUMS` (`sha256sum -c SHA256SUMS` checks them all); with `CNFKIT_RETRAIN=1` it trains again. `ck.inspect(path)`
shows all that a file says: the model with every setting, the command, the seed, and the log of the training.

Above each table stand the command that made its files, and the parts of their model, with the number of entries of all
its tensors, masks among them. "Held out" is the loss on validation points, where the chapter keeps some, at the step
whose weights these are, in the chapter's unit, and other numbers that were saved.
"""
COLUMNS = ("file", "kB", "seed", "steps", "held out", "seconds", "device", "torch")
CONTAINERS = ("Flow", "Dequantised", "Chain", "Inverse", "Sequential")  # other words for their parts
ELSEWHERE = ("command", "seed", "seconds", "device", "torch", "history")  # facts that have a place of their own


def card(folder: Path) -> str:
    """The card of all weights in a folder: by chapter, by command, and by model."""
    text = HEAD
    for chapter, paths in groupby(sorted(folder.glob("*.safetensors")), lambda path: path.name.split("_")[0]):
        text += f"\n## {title(folder, chapter)}\n"
        tables: dict[str, str] = {}
        for path in paths:
            about = ck.inspect(path)
            numbers = sum(prod(shape) for shape, _ in about.tensors.values())
            model = f"{in_words(about.model)}: {numbers} numbers"
            above = f"\n`{about.facts.get('command', '')}`\\\n{model}\n\n" + line(COLUMNS) + line("-" for _ in COLUMNS)
            tables[above] = tables.get(above, "") + line(row(path, about.facts))
        text += "".join(above + rows for above, rows in tables.items())
    return text


def row(path: Path, facts: dict) -> list[object]:
    """What the table says of a file."""
    history = facts.get("history", {})
    steps, losses = history.get("steps", []), history.get("validation", [])
    numbers = {"validation": dict(zip(steps, losses, strict=False)).get(history.get("best_step"))}
    numbers |= {name: value for name, value in facts.items() if name not in ELSEWHERE}
    held_out = [f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float)]
    seed, *where = (facts.get(name, "") for name in ("seed", "seconds", "device", "torch"))
    kilobytes = f"{path.stat().st_size / 1000:.0f}"
    return [f"[{path.stem}]({path.name})", kilobytes, seed, max(steps, default=""), ", ".join(held_out), *where]


def in_words(model: list[str]) -> str:
    """The parts of a model, each kind once, with its settings where all of its kind have the same."""
    kinds: dict[str, Counter] = {}
    for part in model:
        kinds.setdefault(part.split("(")[0], Counter())[part] += 1
    words = []
    for kind, settings in kinds.items():
        name = kind if len(settings) > 1 else next(iter(settings)).removesuffix("()")
        if kind not in CONTAINERS:
            words.append(name if settings.total() == 1 else f"{settings.total()} × {name}")
    return ", ".join(words)


def title(folder: Path, chapter: str) -> str:
    """A chapter's number and title, and where it is."""
    for twin in sorted(folder.parent.glob(f"{chapter}_*.md")):
        heading = re.search(r"^# (.+)", twin.read_text(encoding="utf-8"), re.M)[1]
        return f"[{chapter} {heading}](../{twin.stem}.ipynb)"
    return chapter


def line(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    (folder / "README.md").write_text(card(folder), encoding="utf-8")
