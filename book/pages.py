"""Pages whose code is run: what they print and draw comes from running them.

python book/pages.py          run them all, and write their outputs, figures and numbers, and those of the README

Blocks of Python run one after the other, in one namespace and one folder that is empty at first. One with the line
``% in a new process`` above it runs in a Python of its own, in that folder. A block of text that follows shows what was
printed. Its numbers may differ from one machine to the next, by as much as a line ``% within 0.1`` above it says,
relative to 1 or to the number if that is larger. A figure that a block saves, and the page shows from ``_static``, goes
there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BOOK = Path(__file__).parent
PAGES = ("your_data", "choosing", "design")

BLOCK = re.compile(
    r"^(?P<new>% in a new process\n)?```python\n(?P<code>.*?)^```\n"
    r"(?:\n(?:% within (?P<within>\S+)\n)?```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A block that was run.

    Attributes:
        code: what was run.
        printed: what it printed.
        shown: what the page says that it prints; None if it does not say.
        within: how far the numbers of the two may be apart.
        alone: whether it ran in a process of its own.
    """

    code: str
    printed: str
    shown: str | None
    within: float
    alone: bool


def source(page: str) -> Path:
    """The file of a page."""
    return BOOK / f"{page}.md"


def run(page: str, namespace: dict, folder: Path) -> Iterator[Block]:
    """Run the blocks of a page, in order, in a folder."""
    text = source(page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start("code")].count("\n")
        code = "\n" * line + found["code"]  # so that an error names the line of the page
        printed = (
            _alone(code, folder) if found["new"] else _here(compile(code, f"{page}.md", "exec"), namespace, folder)
        )
        yield Block(found["code"], printed, found["shown"], float(found["within"] or 0), bool(found["new"]))


def _here(code, namespace: dict, folder: Path) -> str:
    before, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    finally:
        os.chdir(before)
    return printed.getvalue()


def _alone(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in another order differ
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"a block in a process of its own failed:\n{found.stderr}")
    return found.stdout


def agree(shown: str, printed: str, within: float) -> bool:
    """Whether two texts are the same, but for numbers that are nearly so."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(a == b or abs(float(a) - float(b)) <= within * max(1.0, abs(float(a))) for a, b in pairs)


def write(page: str) -> None:
    """Run a page, and write what it printed and drew."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = run(page, {"__name__": page}, Path(folder))
        text = source(page).read_text(encoding="utf-8")

        def with_output(found: re.Match) -> str:
            block = next(blocks)
            if block.shown is None:
                return found[0]
            start, end = (index - found.start() for index in found.span("shown"))
            return found[0][:start] + block.printed + found[0][end:]

        text = BLOCK.sub(with_output, text)
        for drawn in Path(folder).glob("*.png"):
            if f"_static/{drawn.name}" in text:
                shutil.copy(drawn, BOOK / "_static" / drawn.name)
    source(page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import matplotlib
    import measured
    import readme_numbers

    matplotlib.use("agg")
    torch.set_num_threads(1)
    for name in PAGES:
        write(name)
    measured.write()
    readme_numbers.write()
