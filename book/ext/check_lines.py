"""Lines printed by ``cnfkit.check``: a calm green mark, and a link to the equation that is checked."""

import re

from docutils import nodes
from ledger import equation_link


def mark(app, doctree):
    """Give every output that is a check line its class, and its equation's label a link."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().strip()
        if not text.startswith("✓") or "\n" in text:
            continue
        block["classes"].append("check")
        block.rawsource = ""  # a block that is not its source is shown as it is, without highlighting
        label = re.search(r"\((eq-[\w-]+)\)$", text)
        if label:
            link = equation_link(label[1], app.env.docname)
            block.children = []
            block += [nodes.Text(text[: label.start()]), link]


def setup(app):
    app.connect("doctree-read", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
