"""pyproject.toml, requirements.lock and environment.yml say the same."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11, the locked one")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
LOCK_LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
LOCK = {canonicalize_name(n): Version(v) for n, _, v in (line.partition("==") for line in LOCK_LINES)}
UNLOCKED = ["bsds300"]  # what neither the book nor the tests need
EXTRAS = {name: extra for name, extra in PROJECT["optional-dependencies"].items() if name not in UNLOCKED}
DIRECT = PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]


def test_the_lock_holds_exact_versions_and_nothing_of_one_machine():
    odd = [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)]
    assert not odd, "neither hosts, paths, editable lines nor local suffixes (+cpu) belong in the lock"
    assert len(LOCK) == len(LOCK_LINES), "a package is locked twice"
    assert not [name for name in LOCK if name.startswith("nvidia") or name in ("triton", "cnfkit")]


@pytest.mark.parametrize("requirement", DIRECT)
def test_the_lock_satisfies_pyproject(requirement):
    wanted = Requirement(requirement)
    name = canonicalize_name(wanted.name)
    assert name in LOCK, f"{name} is asked for by pyproject.toml and missing from requirements.lock"
    assert LOCK[name] in wanted.specifier, f"pyproject.toml asks for {wanted}, the lock has {LOCK[name]}"


def test_conda_python_is_one_that_the_package_and_the_lock_want():
    python = next(d for d in CONDA if isinstance(d, str) and d.startswith("python="))
    version = python.removeprefix("python=")
    assert Version(version) in SpecifierSet(PROJECT["requires-python"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"({version.replace('.', ', ')})" in makefile, "Makefile wants another Python than environment.yml"


def test_conda_leaves_the_packages_to_the_lock():
    assert "pip" in CONDA
    assert next(d["pip"] for d in CONDA if isinstance(d, dict)) == ["-r requirements.lock", "-e ."]


def test_this_environment_is_of_a_python_that_the_package_wants():
    assert Version(".".join(map(str, sys.version_info[:3]))) in SpecifierSet(PROJECT["requires-python"])
