"""The notebooks keep the rules of the course: every rule is a function, and is shown to bite."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
MEGABYTE = 1_000_000

KNOWN_TAGS = (
    {"exercise", "solution", "slide", "volatile"}
    | {f"{verb}-{part}" for verb in ("hide", "remove") for part in ("cell", "input", "output")}
    | {"remove-stdout", "remove-stderr", "scroll-output", "raises-exception"}
    | {f"nbval-{verb}" for verb in ("ignore-output", "check-output", "skip", "raises-exception")}
)
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|private|var)/|[A-Z]:\\Users\\|\b0x[0-9a-fA-F]{6,}")
BASE64 = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\\\n]+")


# --- The rules. Each returns complaints about one notebook; an empty list is good. -------------------


def tags(cell):
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(output):
    """What an output says, without the bytes of its pictures."""
    found = [output.get("text", ""), *output.get("traceback", [])]
    found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return [BASE64.sub("", text) for text in found]


def twin_differs(notebook, twin):
    """The cells in which a notebook and its text twin differ: type, source or tags."""
    one, other = ([(c.cell_type, c.source, tags(c)) for c in nb.cells] for nb in (notebook, twin))
    wrong = [f"cell {i}: {a[1][:60]!r}" for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other):
        wrong.append(f"{len(one)} cells in the notebook, {len(other)} in the twin")
    return wrong


def not_executed(notebook):
    """Code cells that were not executed, or not once each from top to bottom."""
    counts = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    wrong = [] if counts else ["no code cell"]
    wrong += [f"execution counts {counts}"] if counts != list(range(1, len(counts) + 1)) else []
    return wrong + ([] if any(True for _ in outputs(notebook)) else ["no output at all"])


def errors(notebook):
    """Errors and anything on stderr, unless the cell is tagged to raise."""
    return [
        str(texts(output))[:200]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.get("name") == "stderr"
        or (output.output_type == "error" and not {"raises-exception", "nbval-raises-exception"} & {*tags(cell)})
    ]


def unknown_tags(notebook):
    """Tags that nobody knows: a misspelt tag would silently do nothing."""
    return [tag for cell in notebook.cells for tag in tags(cell) if tag not in KNOWN_TAGS]


def wrong_kernel(notebook):
    """A kernel other than python3, which every Jupyter has."""
    name = notebook.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"kernelspec {name!r}"]


def machine_traces(notebook):
    """Outputs with a path or a memory address of the machine that made them."""
    found = (MACHINE.search(text) for output in outputs(notebook) for text in texts(output))
    return [match[0] for match in found if match]


def without_alt(notebook):
    """Pictures that say nothing to those who cannot see them."""
    wrong = []
    for output in outputs(notebook):
        for kind in output.get("data", {}):
            if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip():
                wrong.append(f"{kind} output without metadata {{'{kind}': {{'alt': ...}}}}")
        for tag in re.findall(r"<img\b[^>]*>", BASE64.sub("", str(output.get("data", {}).get("text/html", "")))):
            if not re.search(r"""\balt=(["'])\s*[^\s"'].*?\1""", tag, re.S):
                wrong.append(tag[:100])
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return wrong + re.findall(r"!\[\s*\]\([^)]*\)", prose)


def without_seed(notebook):
    """A notebook that draws other numbers at each run."""
    return [] if any("manual_seed" in cell.source for cell in code_cells(notebook)) else ["no manual_seed"]


def without_check(notebook):
    """A notebook that proves nothing."""
    return [] if any("check(" in cell.source for cell in code_cells(notebook)) else ["no check(...)"]


def exercises_missing(notebook):
    """Fewer than three exercises, or one without its solution."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    directives = re.findall(r"^:{3,}\{exercise\}[^\n]*\n((?::[\w-]+:[^\n]*\n)*)", prose, re.M)
    labels = [label for options in directives for label in re.findall(r"^:label:\s*(\S+)", options, re.M)]
    solved = re.findall(r"^:{3,}\{solution\}\s*(\S+)", prose, re.M)
    wrong = [f"{len(directives)} exercises, wanted 3"] if len(directives) < 3 else []
    wrong += ["an exercise without a label"] if len(labels) < len(directives) else []
    wrong += [f"{label}: {solved.count(label)} solutions" for label in labels if solved.count(label) != 1]
    return wrong + [f"a solution to {label}, which is no exercise" for label in solved if label not in labels]


RULES = [
    not_executed,
    errors,
    unknown_tags,
    wrong_kernel,
    machine_traces,
    without_alt,
    without_seed,
    without_check,
    exercises_missing,
]


def unpaired(folder):
    """Notebooks and chapters' twins that stand alone."""
    stems = {s: {p.stem for p in folder.glob(f"*{s}") if re.match(r"\d\d_", p.name)} for s in (".ipynb", ".md")}
    return [f"{stem}.ipynb has no .md" for stem in sorted(stems[".ipynb"] - stems[".md"])] + [
        f"{stem}.md has no .ipynb (make notebooks)" for stem in sorted(stems[".md"] - stems[".ipynb"])
    ]


def too_large(paths, limit):
    """Files above the limit, with their size."""
    return [f"{path.name}: {path.stat().st_size} bytes" for path in paths if path.stat().st_size > limit]


# --- The notebooks keep them. -------------------------------------------------------------------------

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {"01_change_of_variables", "06_realnvp"} <= {path.stem for path in NOTEBOOKS}


def test_every_notebook_has_its_twin():
    assert unpaired(FOLDER) == []


@each_notebook
def test_notebook_and_twin_are_the_same(path):
    twin = path.with_suffix(".md")
    wrong = twin_differs(nbformat.read(path, as_version=4), jupytext.read(twin))
    assert not wrong, f"{twin.name} was edited since: make notebooks CHAPTERS={path.name[:2]}\n{wrong}"


@each_notebook
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_notebook_keeps_the_rule(path, rule):
    wrong = rule(nbformat.read(path, as_version=4))
    assert not wrong, f"{path.name}: {rule.__doc__}\n{wrong}"


def test_sizes():
    assert too_large(NOTEBOOKS, MEGABYTE) == []
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone: nobody can say what is tracked")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert sum(path.stat().st_size for path in tracked) <= 30 * MEGABYTE


# --- The rules bite. ----------------------------------------------------------------------------------


def good():
    """A notebook that keeps every rule."""
    prose = "\n".join(f":::{{exercise}}\n:label: e{i}\n:::\n\n:::{{solution}} e{i}\n:::\n" for i in range(3))
    shown = [
        new_output("display_data", {"image/png": "aGk="}, metadata={"image/png": {"alt": "A curve"}}),
        new_output("display_data", {"text/html": '<img src="data:image/png;base64,/tmp/" alt="A curve">'}),
        new_output("stream", text="✓ fine\n"),
    ]
    code = new_code_cell("torch.manual_seed(0)\ncheck('fine', 0, below=1)", execution_count=1, outputs=shown)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return new_notebook(cells=[new_markdown_cell(prose), code], metadata=kernel)


def changed(change):
    notebook = good()
    change(notebook.cells[0], notebook.cells[1], notebook)
    return notebook


BAD = [
    (not_executed, lambda prose, code, nb: code.update(execution_count=None)),
    (not_executed, lambda prose, code, nb: code.update(execution_count=7)),
    (not_executed, lambda prose, code, nb: code.update(outputs=[])),
    (not_executed, lambda prose, code, nb: nb.update(cells=[prose])),
    (errors, lambda prose, code, nb: code.outputs.append(new_output("error", ename="E", evalue="v"))),
    (errors, lambda prose, code, nb: code.outputs.append(new_output("stream", name="stderr", text="old!"))),
    (unknown_tags, lambda prose, code, nb: code.metadata.update(tags=["volatil"])),
    (wrong_kernel, lambda prose, code, nb: nb.metadata.update(kernelspec={"name": "cnf-env"})),
    (wrong_kernel, lambda prose, code, nb: nb.metadata.clear()),
    (machine_traces, lambda prose, code, nb: code.outputs.append(new_output("stream", text="/" + "home/me/x"))),
    (
        machine_traces,
        lambda prose, code, nb: code.outputs.append(new_output("display_data", {"text/plain": "<f at 0x7f12ab34cd>"})),
    ),
    (without_alt, lambda prose, code, nb: code.outputs[0].update(metadata={})),
    (without_alt, lambda prose, code, nb: code.outputs[1].data.update({"text/html": "<p><img src='a'></p>"})),
    (without_alt, lambda prose, code, nb: code.outputs[1].data.update({"text/html": '<img alt="" src="a">'})),
    (without_alt, lambda prose, code, nb: prose.update(source=prose.source + "\n![](picture.png)")),
    (without_seed, lambda prose, code, nb: code.update(source="check(1)")),
    (without_check, lambda prose, code, nb: code.update(source="manual_seed(1)")),
    (exercises_missing, lambda prose, code, nb: prose.update(source="")),
    (exercises_missing, lambda prose, code, nb: prose.update(source=prose.source.replace("{solution} e1", "{note}"))),
    (exercises_missing, lambda prose, code, nb: prose.update(source=prose.source.replace(":label: e1\n", ""))),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule):
    assert rule(good()) == []


@pytest.mark.parametrize(("rule", "change"), BAD, ids=[rule.__name__ for rule, _ in BAD])
def test_a_bad_notebook_is_caught(rule, change):
    assert rule(changed(change))


def test_every_rule_has_a_bad_notebook():
    assert {rule for rule, _ in BAD} == set(RULES)


def test_an_error_that_is_wanted_passes():
    notebook = changed(lambda prose, code, nb: code.outputs.append(new_output("error", ename="E", evalue="v")))
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    assert errors(notebook) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda prose, code, nb: code.update(source=code.source + "\n"),
        lambda prose, code, nb: code.metadata.update(tags=["volatile"]),
        lambda prose, code, nb: nb.cells.append(new_markdown_cell("more")),
        lambda prose, code, nb: nb.cells.reverse(),
    ],
    ids=["source", "tags", "one more cell", "order"],
)
def test_a_twin_that_differs_is_caught(change):
    assert twin_differs(good(), good()) == []
    assert twin_differs(good(), changed(change))


def test_a_missing_and_an_orphan_twin_are_caught(tmp_path):
    (tmp_path / "01_a.ipynb").touch()
    (tmp_path / "02_b.md").touch()
    (tmp_path / "README.md").touch()
    assert [line.split()[0] for line in unpaired(tmp_path)] == ["01_a.ipynb", "02_b.md"]


def test_a_large_file_is_caught(tmp_path):
    (tmp_path / "large").write_bytes(base64.b64encode(b"a" * MEGABYTE))
    assert too_large([tmp_path / "large"], MEGABYTE)


# --- nbval compares what it should, with the root's conftest. ------------------------------------------


def nbval(tmp_path, *cells):
    """Run nbval strictly on a notebook of (code, stored text, tags); the numbers of the cells that fail."""
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, (source, stored, marks) in enumerate(cells, 1):
        shown = [new_output("stream", text=stored)]
        notebook.cells.append(new_code_cell(source, execution_count=i, outputs=shown, metadata={"tags": marks}))
    nbformat.write(notebook, tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--nbval", "--nbval-current-env"]
    command += ["-p", "no:cacheprovider", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    run = subprocess.run([*command, str(tmp_path / "one.ipynb")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return [int(number) for number in re.findall(r"^FAILED .*Cell (\d+)", run.stdout, re.M)]


def test_volatile_cells_and_check_lines_are_not_compared_and_all_else_is(tmp_path):
    line = "✓ it holds: measured {}, {} (eq-a)"
    failed = nbval(
        tmp_path,
        ("print('3.2 seconds')", "7.9 seconds\n", ["volatile"]),
        ("print('3.2 seconds')", "7.9 seconds\n", []),
        (f"print({line.format('3.6e-07', 'below 1e-05')!r})", line.format("-1.2e-08", "below 1e-05") + "\n", []),
        (f"print({line.format('3.6e-07', 'below 1e-05')!r})", line.format("3.6e-07", "below 1e-04") + "\n", []),
        ("print('<f at 0x7f0123456789>')", "<f at 0x7f9876543210>\n", []),
        ("1 / 0", "", ["volatile"]),
    )
    assert failed == [1, 3, 5]
