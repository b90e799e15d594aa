"""tests/run_on_device.py: every chapter is run and judged, and what came of it is kept."""

import json
import sys

import nbformat
import pytest
import run_on_device


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    for folder in ("notebooks", "book"):
        (tmp_path / folder).mkdir()
    for name, code in (("01_good", "assert 1 < 2"), ("02_bad", "assert 2 < 1")):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(run_on_device, "ROOT", tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_on_device.py", "--device", "cpu", *arguments])
        return run_on_device.main()

    return tmp_path, call


def test_failures_are_named_and_rows_are_kept_by_chapter(chapters):
    folder, call = chapters
    assert call() == "failed on cpu: 02_bad"
    rows = json.loads((folder / run_on_device.REPORT).read_text())["cpu"]
    assert {name: row["passed"] for name, row in rows.items()} == {"01_good": True, "02_bad": False}
    assert set(rows["01_good"]) == {"passed", "machine", "torch", "python", "date", "seconds"}

    (folder / "notebooks" / "02_bad.ipynb").write_text((folder / "notebooks" / "01_good.ipynb").read_text())
    assert call("02") is None
    again = json.loads((folder / run_on_device.REPORT).read_text())["cpu"]
    assert again["01_good"] == rows["01_good"] and again["02_bad"]["passed"]


def test_a_chapter_that_is_not_there_is_named(chapters):
    assert chapters[1]("03") == "no such chapter: 03"
