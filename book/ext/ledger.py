"""``{checks-ledger}``: every numbered equation of every chapter with its checks, or the reason why it has none.

The checks are the records that ``cnfkit.check`` left in the notebooks; the reasons stand in ``book/unchecked.yml``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
REASONS = ROOT / "book" / "unchecked.yml"
HEADINGS = ("Equation", "Claim", "Measured", "Bound")
EQUATION = re.compile(r"^\$\$(?!\$).+?\$\$[ \t]*\((eq-[\w-]+)\)|^:label:[ \t]*(eq-[\w-]+)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Chapter:
    """A chapter: the labels of its numbered equations and the records of its checks, in order."""

    stem: str
    heading: str
    equations: list[str]
    checks: list[dict]


def text_of(cell: dict) -> str:
    """The source of a cell."""
    return "".join(cell["source"])


def heading_of(cells: list[dict]) -> str:
    """The first heading of a notebook."""
    text = "\n".join(text_of(cell) for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(r"^# +(.+)", text, re.M)
    return found[1].strip() if found else ""


def equations_of(cells: list[dict]) -> list[str]:
    """The labels of a notebook's numbered equations, in order."""
    found = (EQUATION.finditer(text_of(cell)) for cell in cells if cell["cell_type"] == "markdown")
    return [match[1] or match[2] for matches in found for match in matches]


def checks_of(cells: list[dict]) -> list[dict]:
    """The records that ``cnfkit.check`` left in a notebook's outputs, in order."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    records = [output.get("metadata", {}).get("cnfkit", {}).get("check") for output in outputs]
    return [record for record in records if record]


def chapters(folder: Path = ROOT / "notebooks") -> list[Chapter]:
    """All chapters, in the order of their numbers."""
    found = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found.append(Chapter(path.stem, heading_of(cells), equations_of(cells), checks_of(cells)))
    return found


def reasons(path: Path = REASONS) -> dict[str, dict]:
    """For each equation without a check: the ``reason``, and the equation ``through`` which it is checked, if any."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def problems(book: list[Chapter], why: dict[str, dict]) -> list[str]:
    """What keeps the ledger from being complete: each equation has checks, or a reason, and not both."""
    labels = [label for chapter in book for label in chapter.equations]
    checked = {record["equation"] for chapter in book for record in chapter.checks} - {None}
    found = [f"{label}: numbered twice" for label in {label for label in labels if labels.count(label) > 1}]
    found += [f"{label}: neither a check nor a reason" for label in labels if label not in checked | set(why)]
    found += [f"{label}: a check names it, no chapter has it" for label in checked - set(labels)]
    for label, entry in why.items():
        if label not in labels:
            found.append(f"{label}: a reason for an equation that no chapter has")
        elif label in checked:
            found.append(f"{label}: a reason why it has no check, and a check")
        if len(entry.get("reason", "").split()) < 3:
            found.append(f"{label}: the reason says nothing")
        if "through" in entry and entry["through"] not in checked:
            found.append(f"{label}: {entry['through']!r}, through which it is checked, has no check")
    return sorted(found)


def rows_of(records: list[dict]) -> list[tuple[str, str, str]]:
    """Claim, measured value and bound; a claim that was checked several times is one row, with its values' range."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        values.setdefault((record["claim"], record["bound"]), []).append(record["measured"])
    rows = []
    for (claim, bound), measured in values.items():
        ends = dict.fromkeys(f"{value:.3g}" for value in (min(measured), max(measured)))
        rows.append((claim + f" ({len(measured)} times)" * (len(measured) > 1), " to ".join(ends), bound))
    return rows


def equation_link(label: str, docname: str) -> addnodes.pending_xref:
    """A link from a page to a numbered equation; a label that no page has is a warning."""
    link = addnodes.pending_xref("", refdomain="math", reftype="eq", reftarget=label, refdoc=docname, refwarn=True)
    link += nodes.literal(text=label)
    return link


def document_link(docname: str, text: str) -> addnodes.pending_xref:
    """A link to a page."""
    link = addnodes.pending_xref(
        "", refdomain="std", reftype="doc", reftarget=f"/{docname}", refexplicit=True, refwarn=True
    )
    link += nodes.inline(text=text)
    return link


def entry(*inline: nodes.Node, **attributes) -> nodes.entry:
    """A cell of a table."""
    return nodes.entry("", nodes.paragraph("", "", *inline), **attributes)


def claim(cells: tuple[str, str, str]) -> list[nodes.entry]:
    """The cells of a claim, of what was measured, and of its bound."""
    kinds = ("claim", "measured", "bound")
    return [entry(nodes.Text(cell), classes=[kind]) for cell, kind in zip(cells, kinds, strict=True)]


def table(widths: tuple[int, ...], headings: tuple[str, ...], rows: list[nodes.row], *classes: str) -> nodes.container:
    """A table that scrolls in its own box where it is wider than the page."""
    group = nodes.tgroup(cols=len(widths))
    group += [nodes.colspec(colwidth=width) for width in widths]
    head = nodes.row("", *[entry(nodes.Text(heading)) for heading in headings])
    group += [nodes.thead("", head), nodes.tbody("", *rows)]
    box = nodes.table("", group, classes=["colwidths-given", *classes])
    return nodes.container("", box, classes=["checks-ledger-box"])


class Ledger(SphinxDirective):
    """A directive that reads the chapters which are pages of this book."""

    def chapters(self) -> list[Chapter]:
        book = [chapter for chapter in chapters() if f"notebooks/{chapter.stem}" in self.env.found_docs]
        for chapter in book:  # so that new outputs make a new ledger
            self.env.note_dependency(str(ROOT / "notebooks" / f"{chapter.stem}.ipynb"))
        self.env.note_dependency(str(REASONS))
        return book


class LedgerSummary(Ledger):
    """How many equations and checks each chapter has."""

    def run(self):
        book = self.chapters()
        checked = {record["equation"] for chapter in book for record in chapter.checks}
        rows, sums = [], [0, 0, 0]
        for chapter in book:
            counts = [len(chapter.equations), sum(e in checked for e in chapter.equations), len(chapter.checks)]
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
            link = document_link(f"notebooks/{chapter.stem}", f"{chapter.stem[:2]} {chapter.heading}")
            rows.append(nodes.row("", entry(link), *[entry(nodes.Text(str(count))) for count in counts]))
        rows.append(nodes.row("", *[entry(nodes.strong(text=str(cell))) for cell in ("together", *sums)]))
        headings = ("Chapter", "Equations", "Checked", "Checks")
        return [table((52, 16, 16, 16), headings, rows, "counts")]


class ChecksLedger(Ledger):
    """For each chapter a table of its equations, and a folded one of the checks that are about no equation."""

    def run(self):
        book, why = self.chapters(), reasons()
        for problem in problems(book, why):
            logging.getLogger(__name__).warning("the ledger of equations: %s", problem, location=self.get_location())
        about: dict[str, list[dict]] = {}
        for chapter in book:
            for record in chapter.checks:
                elsewhere = f" (in chapter {chapter.stem[:2]})" * (record["equation"] not in chapter.equations)
                about.setdefault(record["equation"], []).append(record | {"claim": record["claim"] + elsewhere})
        return [self.chapter(chapter, about, why) for chapter in book]

    def chapter(self, chapter: Chapter, about: dict[str, list[dict]], why: dict[str, dict]) -> nodes.section:
        """A section with a link to the chapter and its tables."""
        docname = f"notebooks/{chapter.stem}"
        section = nodes.section(ids=[nodes.make_id(f"checks-{docname}")])
        section += nodes.title("", "", document_link(docname, chapter.heading or docname))
        body = [row for label in chapter.equations for row in self.equation(label, about.get(label), why.get(label))]
        section += table((12, 46, 18, 24), HEADINGS, body, "checks-ledger", "of-equations")
        others = rows_of([record for record in chapter.checks if not record["equation"]])
        if others:
            rows = [nodes.row("", *claim(cells)) for cells in others]
            box = nodes.admonition(classes=["dropdown", "checks-of-no-equation"])
            number = sum(not record["equation"] for record in chapter.checks)
            box += nodes.title("", f"{number} checks that are about no numbered equation")
            box += table((58, 18, 24), HEADINGS[1:], rows, "checks-ledger")
            section += box
        return section

    def equation(self, label: str, records: list[dict] | None, why: dict | None) -> list[nodes.row]:
        """The rows of an equation: one for each of its claims, or the reason why there is none."""
        link = equation_link(label, self.env.docname)
        if not records:
            text = [nodes.emphasis(text=(why or {}).get("reason", "No check, and no reason."))]
            if why and "through" in why:
                text += [
                    nodes.Text(" What follows from it is checked: "),
                    equation_link(why["through"], self.env.docname),
                ]
            return [nodes.row("", entry(link), entry(*text, morecols=2))]
        claims = [claim(cells) for cells in rows_of(records)]
        first = entry(link, **({"morerows": len(claims) - 1} if len(claims) > 1 else {}))
        return [nodes.row("", *([first] if k == 0 else []), *cells) for k, cells in enumerate(claims)]


def setup(app):
    app.add_directive("checks-ledger", ChecksLedger)
    app.add_directive("ledger-summary", LedgerSummary)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
