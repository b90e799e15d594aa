"""book/execute.py: a re-run changes nothing, the twin's text wins, an error leaves the old notebook."""

import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "book"))
import execute

TWIN = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# One

```{code-cell} ipython3
:tags: [volatile]

import time

time.perf_counter()
```

```{code-cell} ipython3
import ipywidgets

ipywidgets.IntSlider(3)
```

```{code-cell} ipython3
print(1)
```
"""


@pytest.fixture
def twin(tmp_path):
    path = tmp_path / "01_one.md"
    path.write_text(TWIN, encoding="utf-8")
    execute.execute(path)
    return path


def outputs(twin):
    cells = nbformat.read(twin.with_suffix(".ipynb"), as_version=4).cells
    return [cell.outputs for cell in cells if cell.cell_type == "code"]


def test_a_rerun_changes_nothing_and_an_edit_changes_its_cell(twin):
    notebook = twin.with_suffix(".ipynb")
    first, ids = notebook.read_bytes(), [cell.id for cell in nbformat.read(notebook, 4).cells]
    execute.execute(twin)
    assert notebook.read_bytes() == first
    assert b'"execution"' not in first and b"perf_counter" in first

    old = outputs(twin)
    twin.write_text(TWIN.replace("print(1)", "print(2)"), encoding="utf-8")
    execute.execute(twin)
    assert [cell.id for cell in nbformat.read(notebook, 4).cells][:3] == ids[:3]
    assert outputs(twin)[:2] == old[:2]
    assert outputs(twin)[2][0].text == "2\n"

    execute.execute(twin, refresh_volatile=True)
    assert outputs(twin)[0] != old[0]


def test_an_error_says_where_and_leaves_the_old_notebook(twin):
    notebook = twin.with_suffix(".ipynb")
    first = notebook.read_bytes()
    twin.write_text(TWIN.replace("print(1)", "1 / 0  # here"), encoding="utf-8")
    seconds, problem = execute.try_to_execute(twin, refresh_volatile=False)
    assert seconds is None
    assert "1 / 0  # here" in problem and "ZeroDivisionError" in problem
    assert notebook.read_bytes() == first
    assert [path.name for path in twin.parent.iterdir() if path.suffix == ".part"] == []


def test_widget_state_that_no_output_shows_is_left_out():
    notebook = nbformat.v4.new_notebook(metadata={"widgets": {execute.WIDGET_STATE: {"state": {"0" * 32: {}}}}})
    assert "widgets" not in execute.normalise(notebook, "01_one").metadata


def test_a_chapter_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    with pytest.raises(SystemExit, match="no chapter"):
        execute.chosen([])
    (tmp_path / "01_one.md").touch()
    with pytest.raises(SystemExit, match=r"no such chapter: 07 \(there are: 01\)"):
        execute.chosen(["07"])
    (tmp_path / "02_two.ipynb").touch()
    with pytest.raises(SystemExit, match=r"02_two\.ipynb: no text twin"):
        execute.chosen([])
