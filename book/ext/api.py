"""The library's reference, made from its docstrings.

``{api} MODULE ...`` documents every exported name that lives in these modules or below them, a section for each file;
``{api-table}`` lists the names on all pages below its own, a line each. No list of names is kept anywhere: what
``cnfkit`` exports appears.
"""

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.domains.python import PyObject
from sphinx.util.docutils import SphinxDirective
from torch.nn import Module

import cnfkit
from cnfkit import figures

# What a reader imports, by its full name: all is a name of cnfkit itself, but `figures.show` and the like.
NAMES = {f"cnfkit.{name}": getattr(cnfkit, name) for name in cnfkit.__all__}
NAMES |= {
    f"cnfkit.figures.{name}": thing
    for name, thing in vars(figures).items()
    if inspect.isfunction(thing) and thing.__module__ == figures.__name__ and not name.startswith("_")
}


def modules_on(page: str | Path) -> list[str]:
    """The modules that a page documents."""
    return " ".join(re.findall(r"^```\{api\} (.+)", Path(page).read_text(encoding="utf-8"), re.M)).split()


def names_in(modules: list[str]) -> dict[str, list[str]]:
    """The names that live in these modules or below them, by file, in the order of the source."""
    found = {}
    for module in modules:
        for file in sorted({thing.__module__ for thing in NAMES.values()}):
            if f"{file}.".startswith(f"{module}.") and file not in found:
                names = {thing.__name__: name for name, thing in NAMES.items() if thing.__module__ == file}
                found[file] = [names[name] for name in vars(sys.modules[file]) if name in names]
    return found


def members(kind: type) -> list[str]:
    """What a class itself explains of its methods and properties; of PyTorch's hooks, ``forward`` alone."""
    return [
        name
        for name, member in vars(kind).items()
        if isinstance(member, property) or getattr(member, "__module__", None) == kind.__module__
        if member.__doc__ and not name.startswith("_") and (name == "forward" or not hasattr(Module, name))
    ]


def parents(kind: type) -> list[type]:
    """The exported classes that a class inherits from, the nearest one first."""
    return [parent for parent in kind.__mro__[1:] if parent in NAMES.values()]


def entry(name: str) -> str:
    """The directive that documents a name."""
    thing = NAMES[name]
    if not inspect.isclass(thing):
        return f".. autofunction:: {name}\n"
    lines = [f".. auto{'exception' if issubclass(thing, Exception) else 'class'}:: {name}"]
    if shown := members(thing):
        lines.append(f"   :members: {', '.join(shown)}")
    if parents(thing):
        lines.append("   :show-inheritance:")
    return "\n".join([*lines, ""])


def section(file: str, names: list[str]) -> str:
    """What a file offers, under the file's own docstring: "Heading: introduction."."""
    heading, text = re.fullmatch(r"(.+?)(?:: |\.\s*)(.*)", inspect.getdoc(sys.modules[file]), re.DOTALL).groups()
    return "\n".join([heading, "=" * len(heading), "", text[:1].upper() + text[1:], "", *map(entry, names)])


def table(names: list[str]) -> str:
    """Names and the first lines of their docstrings, side by side."""
    rows = [f"   * - :py:obj:`~{name}`\n     - {inspect.getdoc(NAMES[name]).splitlines()[0]}" for name in names]
    return "\n".join([".. list-table::", "   :widths: 3 7", "   :width: 100%", "   :class: api-table", "", *rows])


class Reference(SphinxDirective):
    """Text in reStructuredText, the language of docstrings, on a page in Markdown."""

    def show(self, text: str) -> list[nodes.Node]:
        for thing in (cnfkit, *NAMES.values()):  # a name that comes or goes makes a new page
            self.env.note_dependency(inspect.getsourcefile(thing))
        box = nodes.Element()
        fenced = ["````{eval-rst}", ".. currentmodule:: cnfkit", "", *text.splitlines(), "````"]
        self.state.nested_parse(StringList(fenced, source=self.env.docname), self.content_offset, box)
        return box.children


class Api(Reference):
    """The entries of some modules' names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        return self.show("\n\n".join(section(*file) for file in names_in(self.arguments[0].split()).items()))


class ApiTable(Reference):
    """A section for each page below this one in the table of contents: a link to it, and its names."""

    def run(self):
        text = []
        for docname in self.env.external_site_map[self.env.docname].child_files():
            page = self.env.doc2path(docname)
            self.env.note_dependency(page)
            title = re.search(r"^# (.+)", Path(page).read_text(encoding="utf-8"), re.M)[1]
            heading = f":doc:`{title} </{docname}>`"
            names = [name for file in names_in(modules_on(page)).values() for name in file]
            text += [heading, "=" * len(heading), "", table(names), ""]
        return self.show("\n".join(text))


def nearest(app, name, thing, options, bases):
    """Of what a class inherits, its nearest parent says enough: that a map is an nn.Module goes without saying."""
    bases[:] = parents(thing)[:1]


def readable(app, what, name, thing, options, arguments, returns):
    """Signatures without what says nothing: a constructor that is PyTorch's, a default that a function makes."""
    if what == "class" and re.sub(r": [~\w.]*Any\b", "", arguments or "") == "(*args, **kwargs)":
        arguments = "()"
    return arguments and arguments.replace("<factory>", "..."), returns


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.config.add_module_names = False
    app.config.autodoc_inherit_docstrings = False
    app.config.autodoc_member_order = "bysource"
    app.config.autodoc_preserve_defaults = True  # as they are written in the source
    app.config.napoleon_use_ivar = True  # attributes in a list, like arguments
    app.config.napoleon_attr_annotations = False  # types stand in the signature
    app.config.python_maximum_signature_line_length = 110
    app.config.toc_object_entries_show_parents = "hide"
    # A link to a name of ours that is not there is a warning. Other libraries have no pages here.
    app.config.nitpicky = True
    app.config.nitpick_ignore_regex = [("py:.*", r"(?!cnfkit\.)\w+\..*")]
    # "Parameters" are what is trained.
    labels = {"parameter": "Arguments", "variable": "Attributes"}
    for field in PyObject.doc_field_types:
        field.label = labels.get(field.name, field.label)
    app.connect("autodoc-process-bases", nearest)
    app.connect("autodoc-process-signature", readable)
    app.add_directive("api", Api)
    app.add_directive("api-table", ApiTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
