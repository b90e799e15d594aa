"""The pages whose code runs, and whose numbers come from measurements: they show what is printed and measured now."""

import math
import re
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import nn

import cnfkit as ck

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book"))

import measured  # noqa: E402  (of the book, as the next two)
import pages  # noqa: E402
import readme_numbers  # noqa: E402

pytestmark = pytest.mark.timeout(300)  # a page belongs to the first test that asks for it
TEXT = {name: pages.source(name).read_text(encoding="utf-8") for name in pages.PAGES}


@pytest.fixture(scope="module", params=pages.PAGES)
def ran(request, tmp_path_factory):
    """A page by name, its blocks as they ran, and the names that they left."""
    namespace, folder = {"__name__": request.param}, tmp_path_factory.mktemp(request.param)
    with mpl.rc_context():
        return request.param, list(pages.run(request.param, namespace, folder)), namespace


def test_a_page_shows_what_is_printed(ran):
    name, blocks, _ = ran
    assert len(blocks) == TEXT[name].count("```python\n") > 2, "a block was overlooked"
    assert sum(block.shown is not None for block in blocks) == TEXT[name].count("```text\n"), "an output was overlooked"
    wrong = [block for block in blocks if block.shown is not None and not block.shown]
    wrong += [block for block in blocks if not pages.agree(block.shown or "", block.printed, block.within)]
    assert not wrong, "\n".join(f"{block.code}\nshown:\n{block.shown}\nprinted:\n{block.printed}" for block in wrong)


def test_another_process_gives_the_same_numbers(ran):
    name, blocks, _ = ran
    alone = [k for k, block in enumerate(blocks) if block.alone]
    assert len(alone) == (1 if name == "your_data" else 0)
    for k in alone:
        assert blocks[k].printed == blocks[k - 1].printed and "tensor" in blocks[k].printed


def test_your_own_data_in_twenty_lines(ran):
    name, blocks, names = ran
    if name != "your_data":
        return
    lines = [line for line in blocks[1].code.splitlines() if line.strip()]
    assert len(lines) <= 21, f"{len(lines)} lines"
    assert all(word in blocks[1].code for word in ("ck.fit(", "ck.evaluate(", ".sample(", "ck.save("))
    assert names["found"].solver_error < 1e-3 and names["found"].nll < names["truth"] + 0.2
    for inside in (*names["in_interval"].T, names["in_region"]):
        assert 0.85 < inside.float().mean() < 0.95


@pytest.mark.parametrize("name", pages.PAGES)
def test_code_fits_the_page(name):
    lines = [line for found in pages.BLOCK.finditer(TEXT[name]) for line in found["code"].splitlines()]
    assert [line for line in lines if len(line) > 78] == []


def test_texts_agree_but_for_the_last_digits_of_numbers():
    assert pages.agree("1.20 ± 3e-05 nats", "1.21  ± 8e-05 nats\n", 0.02)
    assert not pages.agree("1.20 nats", "1.23 nats", 0.02)
    assert not pages.agree("120 nats", "123 nats", 0.02) and pages.agree("120 nats", "122 nats", 0.02)
    assert not pages.agree("1.20 nats", "1.20 bits", 0.02) and not pages.agree("1 2", "1 2 3", 9)
    assert not pages.agree("1", "nan", 9) and not pages.agree("-1", "1", 0) and pages.agree("[1.0000]", "[1.0000]", 0)


def test_a_block_that_fails_is_named_by_the_page_and_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "source", lambda page: tmp_path / f"{page}.md")
    (tmp_path / "p.md").write_text("# P\n\n```python\nx = 1\n```\n\n```python\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as error:
        list(pages.run("p", {}, tmp_path))
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("p.md", 8)
    (tmp_path / "q.md").write_text("% in a new process\n```python\nx\n```\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="NameError: name 'x'"):
        list(pages.run("q", {"x": 1}, tmp_path))


def test_outputs_and_figures_are_written(tmp_path, monkeypatch):
    (tmp_path / "_static").mkdir()
    monkeypatch.setattr(pages, "BOOK", tmp_path)
    code = "from pathlib import Path\nprint(Path('f.png').write_text('ab'))"
    old = f"```python\n{code}\n```\n\n% within 1\n```text\n{{}}```\n\n_static/f.png\n"
    (tmp_path / "p.md").write_text(old.format("9\n"), encoding="utf-8")
    pages.write("p")
    assert (tmp_path / "p.md").read_text(encoding="utf-8") == old.format("2\n")
    assert (tmp_path / "_static" / "f.png").read_text(encoding="utf-8") == "ab"


@pytest.mark.parametrize("name", measured.PAGES)
def test_the_numbers_on_a_page_are_those_that_were_measured(name):
    assert measured.render(TEXT[name]) == TEXT[name], "run: python book/pages.py"


def test_every_number_is_on_one_page():
    text = "\n".join(TEXT[name] for name in measured.PAGES)
    used = re.findall(r"\]\{#([\w-]+)\}", text) + re.findall(r"^% table: (\w+)$", text, re.M)
    assert sorted(used) == sorted([*measured.NUMBERS, *measured.TABLES])


def test_an_unknown_number_is_refused_and_a_changed_one_replaced():
    with pytest.raises(ValueError, match="'speed'"):
        measured.render("[9]{#speed}")
    with pytest.raises(ValueError, match="'speeds'"):
        measured.render("% table: speeds\n% end: speeds")
    assert re.fullmatch(r"about \[[\d.]+×\]\{#own-tangents\}", measured.render("about [0]{#own-tangents}"))


@pytest.mark.parametrize("words", measured.CLAIMS)
def test_what_the_pages_say_in_words_is_so(words):
    text = " ".join(" ".join(TEXT[name] for name in measured.PAGES).split())
    assert words in text, "no page says so any longer: change the claim as well"
    assert measured.CLAIMS[words]()


README = readme_numbers.README.read_text(encoding="utf-8")


def test_the_numbers_of_the_readme_are_those_that_were_measured():
    assert readme_numbers.render(README) == README, "run: python book/pages.py"


def test_every_number_of_the_readme_is_read():
    rows = README.split("## Numbers")[1].split("\n## ")[0].count("\n| ") - 1  # but for the heading
    assert rows == len(readme_numbers.ROWS) == len(readme_numbers.ROW.findall(README))
    cells = [match["cell"] for match in readme_numbers.ROW.finditer(README)]
    typed = readme_numbers.ROW.sub(lambda match: match[0].replace(match["cell"], "9.99"), README)
    assert [match["cell"] for match in readme_numbers.ROW.finditer(readme_numbers.render(typed))] == cells
    with pytest.raises(ValueError, match="'a new one', which 0 entries"):
        readme_numbers.render("| a new one | 1 | chapter 01 |")


def test_a_pattern_that_a_chapter_did_not_print_is_refused(monkeypatch):
    text = {"name": "stdout", "text": ["NICE   2.1 ± 0.3\n", "NICE   2.2 ± 0.3\n"]}
    monkeypatch.setattr(measured, "outputs", lambda chapter: [text])
    assert readme_numbers.found("99", r"NICE +(\S+)") == [(2.1,), (2.2,)]
    assert readme_numbers.each("99", r" +(\S+) ± (\S+)", ["NICE"], which=-1, group=1) == [0.3]
    with pytest.raises(ValueError, match="chapter 99 printed no line"):
        readme_numbers.found("99", r"Glow +(\S+)")


def test_a_check_of_a_chapter_is_found_once(monkeypatch):
    records = [{"claim": "nats gained by one", "measured": 1.5}, {"claim": "nats gained by two", "measured": 2.5}]
    found = [{"metadata": {"cnfkit": {"check": record}}} for record in records]
    monkeypatch.setattr(measured, "outputs", lambda chapter: found)
    assert measured.checked("99", "nats gained by two") == 2.5
    for claim, number in (("nats gained", 2), ("bits", 0)):
        with pytest.raises(ValueError, match=f"chapter 99 has {number} checks that begin with '{claim}'"):
            measured.checked("99", claim)


def test_a_line_of_a_chapter_is_found_once(monkeypatch):
    text = {"name": "stdout", "text": ["  1 probes: off by 1.61 nats\n", "16 probes: off by 3e-04 nats\n"]}
    monkeypatch.setattr(measured, "outputs", lambda chapter: [text, {"data": {}}])
    assert measured.printed("99", "16 probes: off by") == [3e-4]
    with pytest.raises(ValueError):
        measured.printed("99", "4 probes: off by")


class Field(nn.Module):
    """A field by a function of the time and the points."""

    event_shape = 1

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t, z):
        return self.function(t, z)


def solved(function, **options):
    return ck.CNF(Field(function))(torch.full((1, 1), 2.0), solve=ck.Solve(**options))


def conditional():
    return ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, hidden=(4,), context=1)))


def flow(hidden=(4,)):
    return ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, hidden=hidden)))


def another_model():
    ck.save(Path("flow.safetensors"), flow())
    ck.load(Path("flow.safetensors"), flow((5,)))


def going_back():
    """Data so large that the loss is infinite: `fit` warns, and then gives up."""
    loss = ck.NegativeLogLikelihood(ck.Flow(ck.Normal(2), ck.Diagonal(2)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FloatingPointError):
            ck.fit(loss, torch.full((10, 2), 1e30), steps=9, validation=0, progress=False)
    raise caught[0].message


X = torch.zeros(3, 2)
# What the table of errors quotes, and a call that raises it.
ERRORS = {
    "the step vanished": lambda: solved(lambda t, z: z**2),
    "max_steps = … were not enough": lambda: solved(lambda t, z: torch.sin(500 * t) * z, max_steps=10),
    "the field or the state stopped being finite": lambda: solved(
        lambda t, z: z**5, method="rk4", times=ck.uniform_grid(4)
    ),
    "back to the weights of the last record": going_back,
    "tolerance is 1e-08, finer than torch.float32 resolves": lambda: flow().log_prob(X, solve=ck.Solve(tolerance=1e-8)),
    "x has dtype torch.float64, but the parameters are torch.float32": lambda: flow().log_prob(X.double()),
    "context is missing": lambda: conditional().log_prob(X),
    "entries of x are NaN or infinite": lambda: flow().log_prob(X / 0),
    "solve has trace='none', which gives points but no density": lambda: flow().log_prob(
        X, solve=ck.Solve(trace="none")
    ),
    "was made by another model": another_model,
}


@pytest.mark.parametrize("quoted", ERRORS)
def test_errors_say_what_choosing_says(quoted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quoted in TEXT["choosing"]
    with pytest.raises(Exception) as error:
        ERRORS[quoted]()
    pattern = re.escape(quoted).replace("…", r"\d+").replace("the\\ last\\ record", r"step\ \d+")
    assert re.search(pattern, str(error.value)), str(error.value)
    if f"SolveError: {quoted}" in TEXT["choosing"]:
        assert isinstance(error.value, ck.SolveError)


def test_every_error_that_choosing_quotes_is_raised():
    rows = TEXT["choosing"].split("| what you see |")[1].split("\n\n")[0].splitlines()[2:]
    quoted = [re.match(r"\| (?:a checkpoint )?`(?:SolveError: )?([^`(]+?)`", row) for row in rows]
    messages = {found[1] for found in quoted if found and found[1] != "fit"}
    assert messages <= set(ERRORS) and len(messages) == len(ERRORS) - 1  # fit's warning is told in words


def test_what_choosing_says_of_defaults_and_units():
    grid, solve = ck.FrozenGrid(), ck.Solve()
    assert (grid.every, grid.adaptive.tolerance, grid.solve.method) == (25, 5e-4, "rk6")
    assert (solve.trace, solve.gradient, solve.noise, solve.tolerance) == ("exact", "backprop", "rademacher", 1e-5)
    images = ck.Dequantised(ck.Flow(ck.Uniform(4), ck.Diagonal(4)), ck.UniformDequantiser(256))
    bits = ck.bits_per_dimension(images.log_prob(torch.tensor([[0, 99, 200, 255]])), 4)
    assert bits.item() == pytest.approx(8), "knowing nothing of 256 levels costs 8 bits"
    finest = torch.tensor(5e-7)
    flow().log_prob(X, solve=ck.Solve(tolerance=finest.item()))
    with pytest.raises(ValueError, match="finer than"):
        flow().log_prob(X, solve=ck.Solve(tolerance=finest.item() * 0.9))


def test_the_watched_energy_is_a_term_and_no_part_of_the_loss():
    model = flow()
    for parameter in model.parameters():  # the last layer starts at zero, and so does the energy
        nn.init.normal_(parameter)
    loss, terms = ck.NegativeLogLikelihood(model, penalties={"total_derivative": 0.0})(torch.randn(5, 2))
    assert terms["total_derivative"] > 0.1 and math.isclose(loss.item(), terms["nll"].item())
