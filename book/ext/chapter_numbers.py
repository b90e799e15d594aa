"""Equations, theorems, exercises and figures carry the number of their chapter: (6.3), Exercise 6.2.

Sphinx would count through the whole book, so that an equation added to chapter 1 renames all that follow.
The chapter's number is the one in the name of its notebook.
"""

import re


def renumber(app, env):
    """Replace the numbers that Sphinx gave by (chapter, count within the chapter)."""
    renumbered = []
    for docname, kinds in env.toc_fignumbers.items():
        chapter = re.match(r"notebooks/(\d\d)_", docname)
        if chapter:
            renumbered.append(docname)
            for numbers in kinds.values():
                in_order = sorted(numbers, key=numbers.get)
                numbers.update({key: (int(chapter[1]), i) for i, key in enumerate(in_order, 1)})
    return renumbered


def setup(app):
    app.connect("env-get-updated", renumber, priority=900)  # after Sphinx, which numbers at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
