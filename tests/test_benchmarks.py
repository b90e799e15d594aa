"""The benchmarks' own parts, without the peers: timer, search, weights, and the page that says what was measured."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cnfkit as ck

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402  (of the benchmarks, as all below)
import fields  # noqa: E402
import full_size  # noqa: E402
import measure  # noqa: E402
import page  # noqa: E402
import precision  # noqa: E402
import some_numbers  # noqa: E402
import tables  # noqa: E402


def test_the_timer_calls_all_in_turn_and_tells_them_apart():
    order = []

    def wait(name, seconds):
        order.append(name)
        time.sleep(seconds)

    taken = measure.interleaved({"slow": lambda: wait("slow", 0.02), "fast": lambda: wait("fast", 0.0)}, 0.0, least=4)
    assert [sorted(order[k : k + 2]) for k in range(0, len(order), 2)] == [["fast", "slow"]] * 5  # one to warm up
    assert taken["slow"].calls == 4
    assert taken["slow"].low >= 20 > taken["fast"].ms
    assert taken["slow"].over(10).ms == pytest.approx(taken["slow"].ms / 10, abs=1e-4)


def test_the_timer_goes_on_for_its_time():
    taken = measure.interleaved({"wait": lambda: time.sleep(0.01)}, seconds=0.1, least=1, most=50)
    assert 3 < taken["wait"].calls <= 11
    assert measure.interleaved({"wait": lambda: None}, seconds=9, least=1, most=5)["wait"].calls == 5


@pytest.mark.parametrize("functions, limits", [({}, {}), ({"a": print}, {"least": 0}), ({"a": print}, {"most": 1})])
def test_the_timer_refuses_what_it_cannot_do(functions, limits):
    with pytest.raises(ValueError, match="wanted"):
        measure.interleaved(functions, 0.0, **limits)


def test_the_search_finds_the_cheapest_setting():
    tried = []

    def error(tolerance):
        tried.append(tolerance)
        if tolerance > 0.5:
            raise AssertionError("underflow in dt")
        return 3 * tolerance

    setting, reached = measure.cheapest([1.0, 0.1, 1e-2, 1e-3], error, below=1e-2)
    assert tried[:4] == [1.0, 0.1, 1e-2, 1e-3]  # one after the other, and no further than needed
    assert reached == 3 * setting <= 1e-2
    assert 0.33 * 1e-2 / 10**0.25 < setting < 0.34 * 1e-2  # two halvings of a decade
    assert measure.cheapest([1.0, 0.1], error, below=1e-9) is None
    assert measure.cheapest([0.1], error, below=1.0) == (0.1, pytest.approx(0.3))


def test_the_search_takes_whole_numbers_of_steps():
    assert measure.cheapest([1, 2, 4, 8, 16], lambda steps: steps**-4.0, below=1.2e-3) == (6, 6**-4.0)


def test_errors_are_what_they_are_called():
    assert measure.relative_distance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(10**0.5 / 5)
    assert measure.mean_distance(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 0.0])) == 1.5
    assert measure.mean_distance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)) == 2.5


def test_the_peak_of_memory_is_counted_to_the_byte():
    x = torch.zeros(1000)

    def three_at_once():
        a, b = x + 1, x + 2
        return (a + b).sum()

    assert 12_000 <= measure.peak_memory(three_at_once) < 12_600  # blocks are aligned


@pytest.mark.parametrize("kind", ["concat", "hyper", "by autograd"])
def test_with_a_step_checkpointing_keeps_a_state_more_and_the_adjoint_nothing(kind):
    x = torch.randn(64, 2)

    def peak(gradient, steps):
        solve = ck.Solve(method="rk4", times=ck.uniform_grid(steps), gradient=gradient)

        def run_and_forget():
            field = ck.MLPField(2, hidden=(16, 16), time="concat" if kind == "by autograd" else kind)
            cnf = ck.CNF(fields.Bare(field) if kind == "by autograd" else field)
            (-ck.Flow(ck.Normal(2), cnf).log_prob(x, solve=solve).mean()).backward()

        return measure.peak_memory(run_and_forget)

    state = x.numel() * x.element_size()
    assert peak("checkpoint", 12) - peak("checkpoint", 4) == 8 * state
    # beside the last state it keeps of each step whether its numbers were finite, and how large
    assert 0 <= peak("adjoint", 12) - peak("adjoint", 4) <= 8 * 16
    assert peak("backprop", 12) - peak("backprop", 4) > 8 * 20 * state


def test_what_the_numbers_depend_on_names_nobody():
    about = measure.machine(["torch", "no-such-package"])
    assert about["processor"] and about["versions"].keys() == {"torch"}
    assert not any(sign in json.dumps(about) for sign in (str(ROOT), "/home", "/root"))


@pytest.mark.parametrize("name", ["plain", "rnode"])
def test_the_plain_twin_has_the_velocity_of_the_trained_field(name):
    field = fields.trained_flow(name).bijection.field
    x, t = fields.points(50, seed=0), torch.tensor(0.3)
    with torch.no_grad():
        velocity = field(t, x)
        torch.testing.assert_close(fields.PlainField(field)(t, x), velocity, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fields.Bare(field)(t, x), velocity)
    assert velocity.abs().mean() > 0.1, "the field is untrained"


def test_the_trained_fields_are_densities_of_the_pinwheel():
    for name in ("plain", "rnode"):
        evaluation = ck.evaluate(fields.trained_flow(name), fields.points(500, seed=5))
        assert 1.9 < evaluation.nll < 2.4, f"{name}: {evaluation}"


def test_the_twin_refuses_another_field():
    with pytest.raises(ValueError, match="wanted 'concat'"):
        fields.PlainField(ck.MLPField(2))


def test_the_floor_has_the_layers_of_the_field_and_no_more_parameters():
    field = ck.MLPField(2, hidden=(8, 8), time="concat")
    floor = fields.floor(field)
    assert floor(torch.zeros(5, 3)).shape == (5, 2)
    assert sum(p.numel() for p in field.parameters()) - sum(p.numel() for p in floor.parameters()) == 8 + 2


@pytest.mark.parametrize(
    "value, text",
    [(0, "0.00"), (0.0512, "0.0512"), (3.14159, "3.14"), (123.4, "123"), (3e-4, "3.0·10⁻⁴"), (2e6, "2.0·10⁶")],
)
def test_numbers_can_be_read(value, text):
    assert tables.number(value) == text


def test_what_is_derived_from_the_results():
    assert tables.exponent([(1, 9.0), (10, 5.0), (100, 50.0)]) == pytest.approx(1)
    memory = {"steps": [1, 2, 6], "peaks": {"checkpoint": [0, 100, 900]}, "state": 100}
    assert tables.growth(memory, "checkpoint") == 2
    curve = [[1.0, 5, 3.0], [2.0, 9, 2.0], [3.0, 12, 2.5]]
    assert tables.reached(curve, 2.1) == 2.0 and tables.reached(curve, 1.9) is None


def test_a_training_shows_whether_it_reached_its_target():
    runs = {
        "pinwheel/0/cnfkit": {"curve": [[1.0, 5, 3.0], [2.5, 9, 2.0]], "solver_error": 2e-3},
        "pinwheel/0/zuko": {"curve": [[1.0, 5, 3.0], [300.0, 900, 2.4]]},
    }
    results = {"threads": 2, "train": {"targets": {"pinwheel": 2.3}, "runs": runs}}
    text = tables.train(results)[0].text()
    assert "2.50" in text and "≥ 300" in text
    assert tables.goals(results)[0].rows == [["solver error after guarded training, nats", "≤ 0.01", "2.0·10⁻³", "yes"]]


def test_json_is_written_as_it_is_read(tmp_path):
    results = {"curve": [[0.5, 1], [1.5, 2]], "name": "±", "none": None, "nested": {"list": [1, 2]}}
    page.write_json(tmp_path / "new" / "results.json", results)
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    assert json.loads(text) == results
    assert "[ 0.5, 1 ]" in text  # a point of a curve on a line
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_the_page_says_what_the_results_say():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, page.read()) == text, "run: python benchmarks/page.py"


def test_the_page_has_every_table_and_every_figure():
    text, results = page.PAGE.read_text(encoding="utf-8"), page.read()
    measured = [name for name, (needs, _) in page.BLOCKS.items() if needs is None or needs in results]
    assert [name for name in measured if f"% table: {name}\n" not in text] == []
    pictures = [name for name in page.pictures.PICTURES if name in results]
    assert pictures and [name for name in pictures if not (page.RESULTS / f"{name}.png").is_file()] == []


def test_a_page_with_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="'speed'"):
        page.render("% table: speed\n\n% end: speed\n", {})


def test_a_case_that_was_not_measured_is_said_to_be_so():
    assert "Not measured." in page.render("% table: memory\nold\n% end: memory", {"threads": 1})


def test_the_figures_can_be_drawn(tmp_path):
    page.pictures.draw(page.read(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_the_modes_of_precision_are_one_loss_and_are_left_as_they_were_found():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    results = precision.precision(replace(measure.QUICK, batch=16, batches=(32,), images=1))
    assert list(results) == ["16 points", "32 points", "1 images"]
    for rows in results.values():
        errors = {row["name"]: row["error"] for row in rows}
        assert list(errors) == ["float32", "TF32"] and errors["float32"] == 0
        assert errors["TF32"] < 1e-2
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_step_at_full_size_is_taken_apart():
    """With a small network in place of it."""
    rows = full_size.measured("digits-rnode", 2, "cpu", seconds=0.0, compiled=False)
    assert [row["mode"] for row in rows] == list(full_size.MODES)
    errors = [row["error"] for row in rows]
    assert errors[0] == 0 and errors[1] < 1e-2 and 1e-4 < errors[2] < 0.1
    for row in rows:
        assert 0 < row["convolutions"] < 1 and row["images_per_second"] == pytest.approx(2000 / row["ms"], rel=0.05)


def test_the_penalties_of_a_flow_of_images_are_taken_apart(tmp_path, monkeypatch, capsys):
    """By a small network on digits, in four steps, and stopped once on the way."""
    monkeypatch.setattr(ablation, "ROWS", 8)
    monkeypatch.setenv("CNFKIT_PROGRESS", "0")
    small = tmp_path / "small.toml"
    text = (ROOT / "cnfkit" / "configs" / "digits_rnode.toml").read_text()
    small.write_text(text.replace("[32, 32]", "[4]").replace("scales = 2", "scales = 1").replace("1e-3\n", "1e-1\n"))
    said = ["--config", str(small), "--steps", "4", "--output", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        ablation.main([*said, "--minutes", "1e-9"])
    assert stopped.value.code == 0 and not (tmp_path / "runs" / "neither" / "row.json").exists()
    ablation.main(said)
    found = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert [row["penalties"] for row in found["rows"]] == list(ablation.VARIANTS)
    for row in found["rows"]:
        config = (tmp_path / "runs" / row["penalties"] / "config.toml").read_text()
        for penalty in ablation.PENALTIES:
            assert (penalty in config) == (penalty in ablation.VARIANTS[row["penalties"]])
            assert row[penalty] >= 0
        assert row["test"]["nll"] > 0 and row["evaluations"] > 0
    assert "reported" in capsys.readouterr().out


def test_an_ablation_wants_penalties(capsys):
    with pytest.raises(SystemExit):
        ablation.main(["--config", "digits"])
    assert "has the penalties []; wanted kinetic_energy, jacobian_energy" in capsys.readouterr().err


def test_what_a_gpu_took_stands_on_the_page_with_its_name():
    timing = {"ms": 1.0, "low": 1.0, "high": 1.0, "calls": 3}
    rows = [{"name": "float32", "error": 0.0, **timing}, {"name": "TF32", "error": 2e-4, **timing, "ms": 0.5}]
    about = {"processor": "GPU", "python": "3", "versions": {}, "date": "2020-01-01"}
    results = {"gpu": {"machine": about, "threads": 1, "precision": {"512 points": rows}}}
    text = page.render("% table: gpu\n\n% end: gpu", results)
    assert "on GPU; Python 3" in text and "| TF32 | 2.0·10⁻⁴ |" in text and "2.0×" in text


def test_tables_line_up():
    table = tables.Table("", ("", "ms"), [["a", "1.00"], ["longer", "10.0"]])
    assert table.text().splitlines() == ["          ms", "a       1.00", "longer  10.0"]
    assert table.markdown().splitlines()[1] == "| --- | ---: |"
    assert tables.spread({"ms": 12.345, "low": 12.0, "high": 12.5}).split() == ["12.3", "±", "0.2"]


@pytest.fixture
def small_images():
    noise = torch.Generator().manual_seed(0)
    train, test = (torch.randint(256, (n, 1, 14, 14), generator=noise).to(torch.uint8) for n in (60, 40))
    return ck.Images(train, test, 256)


@pytest.mark.parametrize("name", ["realnvp", "iresnet", "rnode"])
def test_a_row_of_the_numbers_can_be_measured_again(tmp_path, monkeypatch, small_images, name):
    monkeypatch.setenv("CNFKIT_RETRAIN", "1")
    monkeypatch.setattr(some_numbers, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(some_numbers, "VALIDATION", 8)
    monkeypatch.setattr(some_numbers, "TEST", 6)
    monkeypatch.setitem(some_numbers.TRAINING, name, {"batch": 4, "lr": 1e-3, "steps": 6})
    found = json.loads(json.dumps(some_numbers.row(name, 0, small_images)))
    assert found["command"] == f"python benchmarks/some_numbers.py {name}/0" and found["images_seen"] == 24
    model = some_numbers.build(name, None, 0)
    ck.load(tmp_path / f"19_{name}_0.safetensors", model)
    again = some_numbers.bits_of(some_numbers.with_terms(model.eval(), None), small_images.test[:6])
    stored = torch.tensor(found["bits_of_images_times_10000"]) / 1e4
    assert (again - stored).abs().max() < 1e-3
    assert abs(found["bits"] - again.mean()) < 1e-3 and len(found["validation"]["seconds"]) == 6


def test_the_sheet_of_images_gives_them_back(tmp_path, small_images):
    some_numbers.write_images(tmp_path / "sheet.png", small_images.test, columns=8)
    assert some_numbers.read_images(tmp_path / "sheet.png").equal(small_images.test)


def test_the_numbers_know_their_rows(capsys):
    with pytest.raises(SystemExit):
        some_numbers.main(["rnode/7"])
    assert "no row 'rnode/7'; wanted some of realnvp/0" in capsys.readouterr().err
