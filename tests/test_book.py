"""The book, built with warnings as errors, can be read from a file with the network off."""

import json
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "book" / "ext")]

import api  # noqa: E402  (the extension that makes the reference)
import execute  # noqa: E402  (of the book)
import ledger  # noqa: E402  (an extension, as those below)
import number_ledger  # noqa: E402
import run_times  # noqa: E402

# The build belongs to the first test that asks for it.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a fresh build; a cached one would not repeat its warnings."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "book", "-b", "html", "."]
    run = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


class Page(HTMLParser):
    """The elements of a page, as (name, attributes)."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))


def fetched_from_outside(html):
    """Addresses that a browser would fetch from the network to show a page."""
    return [
        attrs.get(name)
        for tag, attrs in Page(html).elements
        for name in ("src", "href", "data", "poster")
        if tag not in ("a", "area", "base") and attrs.get("rel") != "canonical"
        if attrs.get(name, "").startswith(("http:", "https:", "//"))
    ]


def without_alt(html):
    """Images that say nothing to those who cannot see them; the file names that Sphinx puts there say nothing."""
    return [
        attrs.get("src", "")[-60:]
        for tag, attrs in Page(html).elements
        if tag == "img" and (not attrs.get("alt", "").strip() or attrs["alt"] in attrs.get("src", ""))
    ]


def chapters():
    """The pages that the table of contents names."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    top = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"]] + [page["file"] for chapter in top for page in (chapter, *chapter.get("sections", ()))]


def pages(built):
    """The html of every page of the course by name; search and index are Sphinx's own."""
    return {name: (built / f"{name}.html").read_text(encoding="utf-8") for name in chapters()}


def test_every_notebook_is_a_chapter():
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert notebooks == {name for name in chapters() if name.startswith("notebooks/")}


def test_every_page_is_there(built):
    missing = [name for name in chapters() if not (built / f"{name}.html").is_file()]
    assert not missing
    assert "book/index.html" in (built / "index.html").read_text(encoding="utf-8")


def test_no_page_needs_the_network(built):
    everywhere = {path.name: fetched_from_outside(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}
    assert {name: found for name, found in everywhere.items() if found} == {}
    assert (built / "_static" / "mathjax" / "tex-chtml.js").is_file()
    assert list((built / "_static" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))


def test_pictures_have_alternative_text(built):
    everywhere = {name: without_alt(html) for name, html in pages(built).items()}
    assert {name: found for name, found in everywhere.items() if found} == {}


def test_chapters_have_numbered_equations_and_marked_checks(built):
    for name, html in pages(built).items():
        if name.startswith("notebooks/"):
            assert 'class="eqno"' in html, f"{name} has no numbered equation"
            assert "output check" in html or " check " in html, f"{name} shows no check"


def test_the_ledger_has_every_numbered_equation(built):
    html = (built / "book" / "ledger.html").read_text(encoding="utf-8")
    for chapter in ledger.chapters():
        page = (built / "notebooks" / f"{chapter.stem}.html").read_text(encoding="utf-8")
        assert page.count('class="eqno"') == len(chapter.equations), f"{chapter.stem}: an equation was overlooked"
        links = [f'href="../notebooks/{chapter.stem}.html#equation-{label}"' for label in chapter.equations]
        assert [link for link in links if link not in html] == []
        assert f'href="../notebooks/{chapter.stem}.html"' in html


def test_every_numbered_equation_has_a_check_or_a_reason():
    assert ledger.problems(ledger.chapters(), ledger.reasons()) == [], (
        "add the check, or a reason to book/unchecked.yml"
    )


def chapter(equations, *checked):
    """A chapter for the ledger."""
    records = [{"claim": "it holds", "equation": label, "measured": 0.0, "bound": "below 1"} for label in checked]
    return ledger.Chapter("01_one", "One", equations, records)


DEFINITION = {"reason": "it is a definition"}


@pytest.mark.parametrize(
    ("book", "why", "problem"),
    [
        ([chapter(["eq-a"])], {}, "eq-a: neither a check nor a reason"),
        ([chapter(["eq-a"], "eq-b")], {"eq-a": DEFINITION}, "eq-b: a check names it, no chapter"),
        ([chapter(["eq-a", "eq-a"], "eq-a")], {}, "eq-a: numbered twice"),
        ([chapter(["eq-a"], "eq-a")], {"eq-a": DEFINITION}, "eq-a: a reason why it has no check"),
        ([chapter(["eq-a"])], {"eq-a": {"reason": "because"}}, "eq-a: the reason says nothing"),
        ([chapter([])], {"eq-a": DEFINITION}, "eq-a: a reason for an equation that no chapter"),
        (
            [chapter(["eq-a", "eq-b"])],
            {"eq-a": DEFINITION | {"through": "eq-b"}, "eq-b": DEFINITION},
            "eq-a: 'eq-b', through which it is checked, has no check",
        ),
    ],
)
def test_what_the_ledger_lacks_is_found(book, why, problem):
    (found,) = ledger.problems(book, why)
    assert found.startswith(problem)


def test_equations_are_found_in_markdown_alone():
    texts = ["$$a$$\n\n$$\nb\n$$ (eq-b)\n\n:::{math}\n:label: eq-c\nc\n:::\n", "$$d$$ (eq-d),\nand $x$ (eq-e)\n"]
    cells = [{"cell_type": "markdown", "source": [text]} for text in texts]
    cells.append({"cell_type": "code", "source": ["text = '\n$$x$$ (eq-x)\n'"]})
    assert ledger.equations_of(cells) == ["eq-b", "eq-c", "eq-d"]


def test_a_claim_that_was_checked_several_times_is_one_line():
    records = [{"claim": "off by", "measured": value, "bound": "below 1"} for value in (2e-7, 1e-8, 3e-7)]
    records.append({"claim": "off by", "measured": 5.0, "bound": "below 9"})
    assert ledger.rows_of(records) == [("off by (3 times)", "1e-08 to 3e-07", "below 1"), ("off by", "5", "below 9")]


def test_numbers_of_ours_are_read_and_gaps_computed(monkeypatch):
    rows = [*number_ledger.SAME, *number_ledger.CLAIMS, *number_ledger.OTHER]

    def shown():
        return [(row.what, row.ours(), row.gap() if callable(row.gap) else row.gap) for row in rows]

    before = shown()
    monkeypatch.setattr(number_ledger, "checked", lambda chapter, claim: 777.0)
    monkeypatch.setattr(number_ledger, "printed", lambda chapter, start: [777.0] * 9)
    lines = ["0  Gaussian  7  9  1", "0  CNF  7  2  1", "the one that differs: ['VAE']"]
    monkeypatch.setattr(number_ledger, "printed_lines", lambda chapter: lines)
    for (what, ours, gap), (_, others, its_gap) in zip(before, shown(), strict=True):
        assert ours != others, f"{what}: ours is typed"
        assert gap != its_gap or gap == number_ledger.NOT_COMPARABLE, f"{what}: the gap is typed"


@pytest.mark.parametrize(("number", "chapter"), [("0.99", "15"), ("86.55", "16"), ("82.82", "16")])
def test_chapters_quote_the_same_numbers_of_the_papers(number, chapter):
    (twin,) = (ROOT / "notebooks").glob(f"{chapter}_*.md")
    typed = " ".join(row.paper for row in number_ledger.SAME + number_ledger.OTHER)
    assert number in typed and number in twin.read_text(encoding="utf-8")


def test_the_ledger_of_numbers_cites_every_paper(built):
    html = (built / "book" / "numbers.html").read_text(encoding="utf-8")
    rows = [*number_ledger.SAME, *number_ledger.CLAIMS, *number_ledger.OTHER, *number_ledger.images()]
    assert html.count("<tr") == len(rows) + len(number_ledger.MISSING) + 4
    assert [row.what for row in rows if "{cite}" not in row.paper] == []
    assert html.count("references.html#") >= len(rows)


def test_differences_have_a_sign_and_nothing_is_zero():
    assert [number_ledger.signed(value) for value in (0.104, -2.0, 0.004, -0.001)] == ["+0.10", "−2.00", "0", "0"]


def test_run_times_are_of_chapters_and_within_the_limit():
    times = json.loads(run_times.TIMES.read_text(encoding="utf-8"))
    assert set(times) <= {chapter.stem for chapter in ledger.chapters()}
    assert [stem for stem, taken in times.items() if not 0 < taken["processor_seconds"] <= 120] == []


def test_minutes_of_training_are_those_of_the_files():
    files, seconds = run_times.trained("06_*")
    assert files == len(list(run_times.WEIGHTS.glob("06_*"))) > 10 and seconds["cpu"] > 60
    assert run_times.trained("01_*") == (0, Counter())
    assert run_times.minutes(Counter({"cpu": 90.0, "H100": 30.0})) == "0.5 on H100, 1.5"
    assert run_times.minutes(Counter()) == "–"


def test_runs_on_devices_are_told_with_what_failed(tmp_path):
    assert run_times.on_devices(tmp_path / "none.json") == ["On a GPU: not run yet."]
    row = {"passed": True, "machine": "H100", "torch": "2.11", "python": "3.12", "date": "2026-01-01", "seconds": 30.0}
    rows = {"cuda": {"01_one": row, "02_two": row | {"passed": False, "seconds": 12.0}}}
    (tmp_path / "some.json").write_text(json.dumps(rows))
    wanted = "On cuda (H100, PyTorch 2.11, 2026-01-01): the checks of 1 of 2 chapters hold (not those of 02), in 42 s."
    assert run_times.on_devices(tmp_path / "some.json") == [wanted]


def test_chapters_are_timed_and_left_as_they_are(tmp_path):
    twin, path = tmp_path / "01_one.md", tmp_path / "times.json"
    kernel = "---\nkernelspec:\n  display_name: Python 3\n  language: python\n  name: python3\n---\n\n"
    twin.write_text(f"{kernel}```{{code-cell}} ipython3\nsum(range(3_000_000))\n```\n", encoding="utf-8")
    path.write_text('{"02_two": {"seconds": 7}}', encoding="utf-8")
    execute.measure_times([twin], path)
    times = json.loads(path.read_text(encoding="utf-8"))
    assert times["02_two"] == {"seconds": 7} and not twin.with_suffix(".ipynb").exists()
    assert times["01_one"]["processor_seconds"] > 0.05 and times["01_one"]["seconds"] > 0.05
    assert times["01_one"]["device"] == "cpu" and times["01_one"]["threads"] == 1


def test_the_glossary_is_sorted_and_every_word_leads_to_a_chapter():
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").split("```{glossary}\n")[1].split("\n```")[0]
    blocks = [block.split("\n  ", 1) for block in f"\n{text}".replace("\n\n", "\n\0").split("\0")]
    entries = {words.strip().splitlines()[0]: said for words, said in blocks}
    assert len(entries) >= 40 and list(entries) == sorted(entries, key=str.casefold)
    assert [word for word, said in entries.items() if "{doc}`" not in said] == []
    assert [word for word, said in entries.items() if len(said.split()) < 8] == []


def test_ways_through_the_book_keep_to_what_chapters_need():
    rows = (ROOT / "book" / "teaching.md").read_text(encoding="utf-8").splitlines()
    ways = [
        re.findall(r"\{doc\}`(\d\d) <", row) for row in rows if row.startswith(("| a few sessions", "| the straight"))
    ]
    assert [len(way) for way in ways] == [5, 11]
    for way in ways:
        for k, number in enumerate(way):
            (twin,) = (ROOT / "notebooks").glob(f"{number}_*.md")
            needs = twin.read_text(encoding="utf-8").split("**You need**")[1].split("\n\n")[0]
            missing = set(re.findall(r"\{doc\}`(\d\d)_", needs)) - set(way[:k])
            assert missing <= ({"04"} if number == "13" else set()), f"{number} needs {missing}"


def test_the_reference_has_every_name_and_signatures_to_read(built):
    reference = {name: html for name, html in pages(built).items() if name.startswith("book/api/")}
    everything = "".join(reference.values())
    assert [name for name in api.NAMES if everything.count(f'id="{name}"') != 1] == []
    assert [name for name in api.NAMES if f'#{name}"' not in reference["book/api/index"]] == []
    signatures = re.findall(r'<dt class="sig .*?</dt>', everything, re.DOTALL)
    shown = [" ".join(unescape(re.sub(r"<.*?>", "", signature)).split()) for signature in signatures]
    assert [text for text in shown if re.search(r"cnfkit\.|torch\.|[<>]| 0x", text)] == []


def test_what_would_be_fetched_is_found():
    assert fetched_from_outside('<script src="https://cdn.example/x.js"></script><link href="//x/y.css">')
    assert fetched_from_outside('<img src="http://x/y.png">')
    assert fetched_from_outside('<a href="https://x/">a link is no resource</a><img src="y.png">') == []


def test_an_image_without_alternative_text_is_found():
    assert without_alt('<img src="a.png">') and without_alt('<img src="a.png" alt=" ">')
    assert without_alt('<img src="../_images/a.png" alt="../_images/a.png">')
    assert without_alt('<img src="a.png" alt="A curve">') == []
