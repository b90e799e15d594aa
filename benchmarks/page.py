"""The book's page on benchmarks: its prose is written by hand, its tables and figures come from the results.

python benchmarks/page.py

A table stands in ``book/benchmarks.md`` between the comments ``% table: NAME`` and ``% end: NAME``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pictures
from tables import TABLES, Table, goals, threads

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCH, TRAIN = RESULTS / "bench.json", RESULTS / "train.json"
FILES = {"cpu": BENCH, "cuda": RESULTS / "bench_cuda.json"}  # by the device that bench.py measured on
PAGE = ROOT / "book" / "benchmarks.md"


def about(results: dict) -> str:
    """What the numbers depend on, in a sentence."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    warning = "From a smoke run, whose times say nothing. " * results.get("quick", False)
    cores = f"{machine['cores']} cores of " if "cores" in machine else ""
    return (
        f"{warning}Measured on {machine['date']} with {threads(results['threads'])} unless said otherwise, on "
        f"{cores}{machine['processor']}; Python {machine['python']}, {versions}."
    )


def render(page: str, results: dict) -> str:
    """The page with the tables of these results, and the figures that belong to them."""

    def block(match: re.Match) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"page has a table {name!r}; wanted one of {', '.join(BLOCKS)}")
        needs, body = BLOCKS[name]
        parts = [body(results)] if needs is None or needs in results else ["Not measured."]
        if name in results and name in pictures.PICTURES:
            alt = pictures.PICTURES[name][1]
            parts.append(f"```{{image}} ../benchmarks/results/{name}.png\n:alt: {alt}\n:width: 100%\n```")
        return "\n\n".join([f"% table: {name}", *parts, f"% end: {name}"])

    return re.sub(r"^% table: (\w+)\n.*?^% end: \1$", block, page, flags=re.DOTALL | re.MULTILINE)


def markdown(tables: Callable[[dict], list[Table]]) -> Callable[[dict], str]:
    return lambda results: "\n\n".join(table.markdown() for table in tables(results))


def gpu(results: dict) -> str:
    """All that was measured on a GPU."""
    tables = [about(results["gpu"]), markdown(goals)(results["gpu"])]
    return "\n\n".join(
        tables + [markdown(body)(results["gpu"]) for name, body in TABLES.items() if name in results["gpu"]]
    )


# What can stand on the page: the results that it needs, and the text that it makes of them.
BLOCKS: dict[str, tuple[str | None, Callable[[dict], str]]] = {
    "about": (None, about),
    "about_train": ("train", lambda results: about(results["train"])),
    "goals": (None, markdown(goals)),
    **{name: (name, markdown(tables)) for name, tables in TABLES.items() if name != "precision"},
    "gpu": ("gpu", gpu),
}


def terminal(name: str, results: dict) -> str:
    """The tables of a case, or the goals, as text."""
    tables = goals(results) if name == "goals" else TABLES[name](results)
    return "\n".join([f"=== {name.replace('_', ' ')}", *(table.text() for table in tables)])


def read() -> dict:
    """All results that are there: of bench.py on the CPU and on a GPU, and of train.py."""
    results = json.loads(BENCH.read_text(encoding="utf-8"))
    if TRAIN.is_file():
        results["train"] = json.loads(TRAIN.read_text(encoding="utf-8"))
    if FILES["cuda"].is_file():
        results["gpu"] = json.loads(FILES["cuda"].read_text(encoding="utf-8"))
    return results


def write_json(path: Path, results: dict) -> None:
    """Write results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)  # a list of numbers on a line
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)


def write() -> None:
    """Bring tables and figures of the page up to date, and the numbers of the page on choosing."""
    results = read()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    pictures.draw(results, RESULTS)
    sys.path.insert(0, str(PAGE.parent))
    import measured  # it reads these results

    measured.write()


if __name__ == "__main__":
    write()
