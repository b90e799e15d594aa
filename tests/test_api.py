"""The reference: every exported name stands on one page of it, and its docstring has the house's form."""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections import Counter
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from cnfkit import CNF, Base, Bijection, MLPField

pytest.importorskip("sphinx", reason="makes the pages")
BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK / "ext"))

import api  # noqa: E402  (the extension that makes them)

PAGES = {page.stem: api.modules_on(page) for page in sorted((BOOK / "api").glob("*.md"))}

# What has no example, and why. Nor have abstract classes, and figures, which show nothing outside a notebook.
NO_EXAMPLE = {
    "cnfkit.cifar10": "its files are not everywhere",
    "cnfkit.fashion_mnist": "its files are not everywhere",
    "cnfkit.mnist": "its files are not everywhere",
    "cnfkit.retrain": "a switch of the environment",
    "cnfkit.trained": "a chapter's weights, or that switch",
}


def test_every_name_is_on_one_page():
    sections = [api.section(*file) for modules in PAGES.values() for file in api.names_in(modules).items()]
    where = Counter(re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(sections), re.M))
    missing = {name: thing.__module__ for name, thing in api.NAMES.items() if name not in where}
    assert not missing, "add the module to a page in book/api"
    assert not [name for name, pages in where.items() if pages > 1], "on more than one page"


@pytest.mark.parametrize("module", [module for modules in PAGES.values() for module in modules])
def test_the_modules_on_the_pages_exist(module):
    importlib.import_module(module)


def test_members_are_what_users_call():
    assert api.members(Bijection) == ["forward", "inverse", "initialize"]
    assert api.members(CNF) == ["between"], "what it inherits stands where it comes from"
    assert api.members(MLPField) == ["forward", "moments", "with_products"], "no hooks of PyTorch's"


def listed(doc: str, title: str) -> set[str]:
    """The names that a section of a docstring explains."""
    section = re.search(rf"^{title}:\n((?:\n| +.*\n?)+)", doc, re.M)
    return set(re.findall(r"^    (\S[^:]*):", section[1], re.M)) if section else set()


def raised(thing, helpers: bool = True) -> set[str]:
    """The errors of a function, or of a class's functions but those that list their own.

    That is what they raise in so many words, what the library's functions raise that they call by name, and what the
    constructor raises that a class inherits.
    """
    errors, nodes = set(), ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0].body
    if inspect.isclass(thing) and not is_dataclass(thing) and "__init__" not in vars(thing) and ours(thing.__init__):
        errors |= raised(thing.__init__)
    while nodes:
        node, *nodes = nodes
        if isinstance(node, ast.FunctionDef) and "Raises:" in (ast.get_docstring(node) or ""):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            errors |= set(re.findall(r"\b[A-Z]\w+$", ast.unparse(node.exc.func)))
        if helpers and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = vars(sys.modules[thing.__module__]).get(node.func.id)
            if inspect.isfunction(called) and ours(called):
                errors |= raised(called, helpers=False)
    return errors


def ours(thing) -> bool:
    return getattr(thing, "__module__", "").startswith("cnfkit")


def form(thing, whole: bool) -> list[str]:
    """What a docstring lacks of the form that all have; only whole ones need every section."""
    doc = inspect.getdoc(thing) + "\n"
    first, second, *_ = [*doc.splitlines(), ""]
    found = [] if first.endswith(".") and not second else ["its first line is no sentence that ends there"]
    explained, errors = listed(doc, "Args"), {name for names in listed(doc, "Raises") for name in names.split(", ")}
    if whole or explained:
        taken = set(inspect.signature(thing).parameters) - {"self", "cls"}
        if inspect.isclass(thing) and not ours(thing.__init__):
            taken = set()  # PyTorch's constructor takes what you like
        attributes = listed(doc, "Attributes") if is_dataclass(thing) else set()
        found += [f"Args: lacks {name}" for name in sorted(taken - explained - attributes)]
        found += [f"Args: has {name!r}, which is no argument" for name in sorted(explained - taken)]
    if whole or errors:
        found += [f"Raises: lacks {name}" for name in sorted(raised(thing) - errors)]
    return found


def faults(name: str, thing) -> list[str]:
    """What the docstrings of an exported name lack, in words: its own, and those of its methods."""
    if not thing.__doc__:
        return ["it has no docstring"]
    kind = inspect.isclass(thing)
    found = form(thing, whole=not (kind and issubclass(thing, Exception)))  # an error is made by the library alone
    for member in api.members(thing) if kind else ():
        function = vars(thing)[member]
        function = getattr(function, "__func__", getattr(function, "fget", function))
        found += [f"{member}: {fault}" for fault in form(function, whole=False)]
    map_or_base = kind and issubclass(thing, Bijection | Base) and not inspect.isabstract(thing)
    if (map_or_base or thing.__module__ == "cnfkit.losses") and ".. math::" not in thing.__doc__:
        found.append("it has no equation (.. math::)")
    needs_none = name in NO_EXAMPLE or inspect.isabstract(thing) or name.startswith("cnfkit.figures.")
    if not needs_none and ">>> " not in thing.__doc__:
        found.append("it has no example (>>>)")
    return found


@pytest.mark.parametrize("name", api.NAMES)
def test_the_docstring_has_the_form(name):
    found = faults(name, api.NAMES[name])
    assert not found, f"the docstring of {name}: {'; '.join(found)}"


def test_what_has_no_example_is_known_and_still_has_none():
    assert not [name for name in NO_EXAMPLE if ">>> " in api.NAMES[name].__doc__]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        (r":math:`t_1`.", r":math:`t_1`", "its first line is no sentence that ends there"),
        ("from data at", "from data\n    at", "its first line is no sentence that ends there"),
        ("interval: ", "intervals: ", "Args: has 'intervals', which is no argument"),
        ("interval: ", "intervals: ", "Args: lacks interval"),
        ("Args:", "Arguments:", "Args: lacks field"),
        ("TypeError: ", "KeyError: ", "Raises: lacks TypeError"),
        ("Raises:", "Errors:", "Raises: lacks ValueError"),
        (".. math::", "..", "it has no equation (.. math::)"),
        (">>> ", "", "it has no example (>>>)"),
    ],
)
def test_a_fault_is_found(monkeypatch, old, new, fault):
    assert old in CNF.__doc__ and faults("CNF", CNF) == []
    monkeypatch.setattr(CNF, "__doc__", CNF.__doc__.replace(old, new))
    assert fault in faults("CNF", CNF)


def test_a_method_s_fault_is_found(monkeypatch):
    function = MLPField.with_products
    monkeypatch.setattr(function, "__doc__", function.__doc__.replace("probes: ", "noise: "))
    assert "with_products: Args: lacks probes" in faults("MLPField", MLPField)
