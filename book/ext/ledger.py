"""``{checks-ledger}``: every check of every notebook, with its equation, in one table per chapter."""

import json
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

HEADINGS = ("Equation", "Claim", "Measured", "Bound")


def heading_of(cells: list[dict]) -> str:
    """The first heading of a notebook."""
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(r"^# +(.+)", text, re.M)
    return found[1].strip() if found else ""


def checks_of(cells: list[dict]) -> list[dict]:
    """The records that ``cnfkit.check`` left in a notebook's outputs, in order."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    records = [output.get("metadata", {}).get("cnfkit", {}).get("check") for output in outputs]
    return [record for record in records if record]


def equation_link(label: str, docname: str) -> addnodes.pending_xref:
    """A link from a page to a numbered equation; a label that no page has is a warning."""
    link = addnodes.pending_xref("", refdomain="math", reftype="eq", reftarget=label, refdoc=docname, refwarn=True)
    link += nodes.literal(text=label)
    return link


class ChecksLedger(SphinxDirective):
    """One table per chapter of the book, in the order of their numbers."""

    def run(self):
        chapters = []
        for path in sorted(Path(self.env.srcdir, "notebooks").glob("[0-9][0-9]_*.ipynb")):
            docname = f"notebooks/{path.stem}"
            if docname not in self.env.found_docs:
                continue
            self.env.note_dependency(str(path))  # so that new outputs make a new ledger
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            records = checks_of(cells)
            if records:
                chapters.append(self.chapter(docname, heading_of(cells), records))
        return chapters or [nodes.paragraph(text="No notebook holds a check yet.")]

    def chapter(self, docname: str, heading: str, records: list[dict]) -> nodes.section:
        """A section with a link to the chapter and its table."""
        section = nodes.section(ids=[nodes.make_id(f"checks-{docname}")])
        link = addnodes.pending_xref(
            "", refdomain="std", reftype="doc", reftarget=f"/{docname}", refexplicit=True, refwarn=True
        )
        link += nodes.inline(text=heading or docname)
        section += [nodes.title("", "", link), self.table(records)]
        return section

    def table(self, records: list[dict]) -> nodes.container:
        """The checks of one chapter, a row each."""
        table = nodes.table(classes=["checks-ledger"])
        group = nodes.tgroup(cols=len(HEADINGS))
        group += [nodes.colspec(colwidth=width) for width in (10, 60, 14, 16)]
        head, body = nodes.thead(), nodes.tbody()
        head += self.row([nodes.Text(heading) for heading in HEADINGS])
        for record in records:
            equation = record.get("equation")
            body += self.row(
                [
                    equation_link(equation, self.env.docname) if equation else nodes.Text("–"),
                    nodes.Text(record["claim"]),
                    nodes.Text(f"{record['measured']:.3g}"),
                    nodes.Text(record["bound"]),
                ]
            )
        group += [head, body]
        table += group
        # A wide table scrolls in its own box on a phone.
        return nodes.container("", table, classes=["checks-ledger-box"])

    @staticmethod
    def row(cells: list[nodes.Node]) -> nodes.row:
        """A table row of inline nodes."""
        return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells])


def setup(app):
    app.add_directive("checks-ledger", ChecksLedger)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
