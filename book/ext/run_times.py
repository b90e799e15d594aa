"""``{run-times}``: how long each chapter takes, and where it ran besides.

From ``book/times.json``, ``book/on_device.json``, and the weights that the chapters load.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from docutils import nodes
from ledger import ROOT, Ledger, document_link, entry, table

import cnfkit as ck

TIMES = ROOT / "book" / "times.json"
DEVICES = ROOT / "book" / "on_device.json"
WEIGHTS = ROOT / "notebooks" / "checkpoints"


def trained(pattern: str) -> tuple[int, Counter]:
    """How many files of weights have such names, and the seconds that they took to train, by device."""
    facts = [ck.inspect(path).facts for path in sorted(WEIGHTS.glob(f"{pattern}.safetensors"))]
    seconds = Counter()
    for fact in facts:
        seconds[fact["device"]] += fact["seconds"]
    return len(facts), seconds


def minutes(seconds: Counter) -> str:
    """Minutes, and on which device where it is no CPU."""
    where = {device: "" if device == "cpu" else f" on {device}" for device in seconds}
    return ", ".join(f"{taken / 60:.1f}{where[device]}" for device, taken in sorted(seconds.items())) or "–"


def on_devices(path: Path = DEVICES) -> list[str]:
    """Of each device that ``make test-gpu`` ran on: which machine, how many chapters hold there, in what time."""
    if not path.exists():
        return ["On a GPU: not run yet."]
    said = []
    for device, rows in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        where = "; ".join(sorted({f"{row['machine']}, PyTorch {row['torch']}, {row['date']}" for row in rows.values()}))
        failed = [chapter[:2] for chapter, row in sorted(rows.items()) if not row["passed"]]
        held = f"the checks of {len(rows) - len(failed)} of {len(rows)} chapters hold"
        held += f" (not those of {', '.join(failed)})" if failed else ""
        said.append(f"On {device} ({where}): {held}, in {sum(row['seconds'] for row in rows.values()):.0f} s.")
    return said


class RunTimes(Ledger):
    """A table of the chapters, and a line about the machine."""

    def run(self):
        self.env.note_dependency(str(TIMES))
        times = json.loads(TIMES.read_text(encoding="utf-8"))
        rows, together, files, training = [], 0.0, 0, Counter()
        for chapter in self.chapters():
            taken = times.get(chapter.stem, {}).get("processor_seconds")
            number, seconds = trained(f"{chapter.stem[:2]}_*")
            together, files, training = together + (taken or 0), files + number, training + seconds
            cells = [f"{taken:.0f}" if taken else "–", str(number), minutes(seconds)]
            link = document_link(f"notebooks/{chapter.stem}", f"{chapter.stem[:2]} {chapter.heading}")
            rows.append(nodes.row("", entry(link), *[entry(nodes.Text(cell)) for cell in cells]))
        cells = ["together", f"{together:.0f}", str(files), minutes(training)]
        rows.append(nodes.row("", *[entry(nodes.strong(text=cell)) for cell in cells]))
        shown = [times[chapter.stem] for chapter in self.chapters() if chapter.stem in times]
        headings = ("Chapter", "Run, s", "Files", "Training, min")
        self.env.note_dependency(str(DEVICES))
        lines = [provenance(shown), *on_devices()]
        return [table((52, 14, 12, 22), headings, rows, "counts"), *[nodes.paragraph(text=line) for line in lines]]


def provenance(times: list[dict]) -> str:
    """Where and when the seconds were measured."""
    where = {(time["processor"], time["device"], time["threads"], time["torch"]) for time in times}
    if not times:
        return ""
    dates = sorted({time["date"] for time in times})
    machines = "; ".join(f"{p} ({d}), {t} thread{'s' * (t > 1)}, PyTorch {torch}" for p, d, t, torch in sorted(where))
    return f"The seconds on {machines}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def setup(app):
    app.add_directive("run-times", RunTimes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
