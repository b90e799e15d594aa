"""Figures: alternative texts, pictures that move without a kernel, live controls, and nothing left open."""

import base64
import io
import re
import struct
from html.parser import HTMLParser

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from builders import seeded
from matplotlib.colors import to_rgb
from PIL import Image

from cnfkit import Normal, figures

VALUES = [0.0, 0.5, 2.0]


def line(slope: float) -> plt.Figure:
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [0, slope])
    return fig


def page(**options) -> str:
    arguments = dict(labels=["0", "0.5", "2"], name="slope", alt="A line") | options
    return figures.frames((line(value) for value in VALUES), **arguments)


class Page(HTMLParser):
    """The elements of a page, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(autouse=True)
def nothing_left_open():
    plt.close("all")
    yield
    assert plt.get_fignums() == []


@pytest.fixture
def shown(monkeypatch) -> list[tuple[dict, dict]]:
    """What a kernel that does not exist was asked to display."""
    outputs = []
    monkeypatch.setattr(figures, "in_kernel", lambda: True)
    monkeypatch.setattr(figures, "live", lambda: False)
    monkeypatch.setattr("IPython.display.display", lambda data, **options: outputs.append((data, options)))
    return outputs


# One figure


def test_show_gives_the_kernel_picture_and_alternative_text(shown):
    figures.show(line(1), "A rising line", caption="It *rises*.")
    (picture, options), (caption, _) = shown
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "A rising line"}}}
    assert base64.b64decode(picture["image/png"]).startswith(b"\x89PNG") and picture["text/plain"] == "A rising line"
    assert caption["text/markdown"] == "*It *rises*.*"


def test_show_without_a_caption(shown):
    figures.show(line(1), "A rising line")
    assert len(shown) == 1


def test_show_outside_a_kernel_draws_all_the_same(capsys):
    """A script that runs a chapter's cells finds what is wrong with its figures."""
    figures.show(line(1), "A rising line")
    assert capsys.readouterr().out == ""


def test_same_figure_same_bytes(shown):
    for _ in range(2):
        figures.show(line(1), "A rising line")
    assert shown[0] == shown[1]


# Stored frames


def test_frames_are_the_same_bytes_at_every_run():
    assert page(play=True) == page(play=True)


@pytest.mark.parametrize("start", [0, 2])
def test_one_image_per_value_each_with_its_alternative_text(start):
    parsed = Page(page(start=start))
    pictures = parsed.all("img")
    assert [picture["alt"] for picture in pictures] == [f"A line (slope = {value})" for value in ("0", "0.5", "2")]
    assert [k for k, picture in enumerate(pictures) if "display:none" not in picture["style"]] == [start]
    kinds, data = zip(*[picture["src"].split(",") for picture in pictures], strict=True)
    assert set(kinds) == {"data:image/webp;base64"} and len(set(data)) == 3
    assert all(Image.open(io.BytesIO(base64.b64decode(image))).format == "WEBP" for image in data)
    (slider,) = parsed.all("input")
    assert slider | {"oninput": ""} == slider | {"oninput": ""}
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "2", str(start))
    assert slider["aria-label"] == "slope" and parsed.text.strip() == f"slope = {['0', '0.5', '2'][start]}"
    assert parsed.open == []


@pytest.mark.parametrize("play", [False, True])
def test_frames_need_no_script_no_network_and_no_identifier(play):
    parsed = Page(page(play=play))
    assert not {"script", "link", "iframe", "style"} & {tag for tag, _ in parsed.elements}
    attributes = [(name, value) for _, attributes in parsed.elements for name, value in attributes.items()]
    assert all(value.startswith("data:image/") for name, value in attributes if name in ("src", "href"))
    assert not any("http" in value or "url(" in value for name, value in attributes if name != "src")
    assert "id" not in dict(attributes), "a picture can be shown twice on a page"
    assert len(parsed.all("button")) == play


def test_texts_are_escaped():
    nasty = "\"><script>alert('1')</script>&amp;"
    parsed = Page(page(alt=nasty, name=nasty, labels=[nasty, "1", "2"]))
    assert not parsed.all("script")
    assert parsed.all("img")[0]["alt"] == f"{nasty} ({nasty} = {nasty})"
    assert parsed.all("img")[0]["data-label"] == nasty and parsed.all("input")[0]["aria-label"] == nasty
    assert parsed.text.strip() == f"{nasty} = {nasty}"


def test_explore_shows_stored_frames_in_a_kernel(shown):
    asked = []

    def draw(value):
        asked.append(value)
        return line(value)

    figures.explore(draw, VALUES, "slope", "A line", caption="Move it.", start=1, play=True)
    (output, options), (caption, _) = shown
    assert asked == VALUES and options == {"raw": True}
    assert output["text/html"] == page(start=1, play=True)
    assert output["text/plain"] == "A line (slope: 0 to 2)" and caption["text/plain"] == "Move it."


def test_explore_outside_a_kernel_draws_nothing(capsys):
    figures.explore(line, VALUES, "slope", "A line", caption="Move it.")
    assert capsys.readouterr().out == ""


# Live controls


def test_explore_is_live_where_a_kernel_is(shown, monkeypatch):
    monkeypatch.setattr(figures, "live", lambda: True)
    asked = []

    def draw(value):
        asked.append(value)
        return line(value)

    figures.explore(draw, VALUES, "slope", "A line", start=1)
    box = next(data for data, _ in shown if isinstance(data, ipywidgets.VBox))
    slider, output = box.children
    assert isinstance(slider, ipywidgets.FloatSlider) and isinstance(output, ipywidgets.Output)
    assert (slider.min, slider.max, slider.value, slider.description) == (0.0, 2.0, 0.5, "slope")
    assert asked == [0.5]
    slider.value = 1.3  # not one of the stored values
    assert asked == [0.5, 1.3]
    pictures = [options["metadata"]["image/png"]["alt"] for _, options in shown if "metadata" in options]
    assert pictures == ["A line (slope = 0.5)", "A line (slope = 1.3)"]


# Refusals


@pytest.mark.parametrize("alt", ["", "  \n"])
@pytest.mark.parametrize("mode", ["outside", "stored", "live"])
def test_no_picture_without_an_alternative_text(monkeypatch, alt, mode):
    monkeypatch.setattr(figures, "in_kernel", lambda: mode != "outside")
    monkeypatch.setattr(figures, "live", lambda: mode == "live")
    asked = []
    with pytest.raises(ValueError, match="alt is empty"):
        figures.explore(asked.append, VALUES, "slope", alt)
    with pytest.raises(ValueError, match="alt is empty"):
        figures.frames(map(asked.append, VALUES), ["0", "1", "2"], "slope", alt)
    assert asked == []
    with pytest.raises(ValueError, match="alt is empty"):
        figures.show(fig := line(1), alt)
    plt.close(fig)


@pytest.mark.parametrize(
    ("values", "start", "message"),
    [([], 0, "values has 0"), ([1.0], 0, "values has 1"), (VALUES, 3, "start is 3"), (VALUES, -1, "start is -1")],
)
def test_a_slider_needs_values(values, start, message):
    with pytest.raises(ValueError, match=message):
        figures.explore(line, values, "slope", "A line", start=start)


@pytest.mark.parametrize(("labels", "start"), [(["0", "1", "2"], 3), (["0", "1", "2"], -1), ([], 0)])
def test_frames_start_with_one_of_them(labels, start):
    with pytest.raises(ValueError, match=f"start is {start} of {len(labels)} frames"):
        figures.frames(iter(()), labels, "slope", "A line", start=start)


@pytest.mark.parametrize("labels", [["0"], ["0", "1", "2", "3"]])
def test_frames_have_a_label_each(labels):
    with pytest.raises(ValueError, match="argument"):
        figures.frames([line(value) for value in VALUES], labels, "slope", "A line")
    plt.close("all")


# What is drawn


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_density_is_drawn_the_right_way_up(ax):
    """The first row is the bottom, as the axis has it."""
    values = figures.density(ax, lambda x: -(x - torch.tensor([1.0, 2.0])).square().sum(-1), (-3, 3, -4, 4), n=61)
    assert values.shape == (61, 61)
    row, column = np.unravel_index(values.argmax().item(), values.shape)
    assert (row, column) == (int((2 + 4) / 8 * 60), int((1 + 3) / 6 * 60))
    (image,) = ax.get_images()
    assert image.origin == "lower" and tuple(image.get_extent()) == (-3, 3, -4, 4)
    assert torch.equal(torch.as_tensor(np.asarray(image.get_array())), values)


def test_density_of_a_normal_distribution_is_its_density(ax):
    values = figures.density(ax, Normal(2).log_prob, (-5, 5, -5, 5), n=101)
    assert values.sum().item() * 0.1**2 == pytest.approx(1, abs=1e-3)


def test_points_are_drawn_where_they_are(ax):
    x = torch.randn(20, 2, generator=seeded()).requires_grad_()
    figures.points(ax, x, limits=(-2, 2, -1, 1))
    (cloud,) = ax.collections
    np.testing.assert_allclose(cloud.get_offsets(), x.detach())
    assert ax.get_xlim() == (-2, 2) and ax.get_ylim() == (-1, 1)
    assert tuple(cloud.get_facecolor()[0, :3]) == to_rgb(figures.DATA)


def test_grid_draws_the_image_of_both_families_of_lines(ax):
    figures.grid(ax, lambda x: 2 * x + torch.tensor([10.0, 0.0]), (-1, 1, -3, 3), lines=5)
    assert len(ax.lines) == 10
    xs, ys = (np.concatenate([getattr(one, f"get_{axis}data")() for one in ax.lines]) for axis in "xy")
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == pytest.approx((8, 12, -6, 6))


def test_images_are_laid_out_row_by_row(ax):
    pictures = torch.arange(1, 4).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    figures.images(ax, pictures, columns=2, levels=4)
    (sheet,) = ax.get_images()
    assert np.asarray(sheet.get_array()).tolist() == [
        [1, 1, 0, 2, 2],
        [1, 1, 0, 2, 2],
        [0, 0, 0, 0, 0],
        [3, 3, 0, 0, 0],
        [3, 3, 0, 0, 0],
    ]
    assert sheet.get_clim() == (0, 3)


def test_a_picture_is_kept_in_few_bytes_and_true_colours(shown):
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.imshow(np.random.default_rng(0).random((30, 60)).cumsum(0), cmap=figures.DENSITY)
    ax.plot([0, 59], [0, 29], color=figures.LATENT, linewidth=0.5)  # few pixels have its colour
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    figures.show(fig, "Noise that grows, and a thin line")
    kept = base64.b64decode(shown[0][0]["image/png"])
    before, after = (np.asarray(Image.open(picture).convert("RGB"), int) for picture in (buffer, io.BytesIO(kept)))
    assert np.abs(after - before).max() <= 20 and len(kept) < 0.6 * len(buffer.getvalue())


def test_the_style_is_one_and_its_colours_differ_in_lightness():
    with plt.rc_context():
        figures.use_style()
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == figures.CYCLE
        assert plt.rcParams["font.size"] >= 12
    assert len(set(figures.CYCLE)) == len(figures.CYCLE)
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in figures.CYCLE)


def test_pictures_are_wide_enough_for_a_page(shown):
    figures.show(plt.subplots(figsize=(6, 3))[0], "Nothing")
    png = base64.b64decode(shown[0][0]["image/png"])
    assert struct.unpack(">2I", png[16:24]) == (780, 390)


@pytest.mark.parametrize(("values", "step"), [([0, 1, 2, 3], 1.0), ([0.0, 0.5, 2.0], 0.02)])
def test_whole_numbers_move_by_one(monkeypatch, values, step):
    made = []
    monkeypatch.setattr(figures, "live", lambda: True)
    monkeypatch.setattr("IPython.display.display", made.append)
    figures.explore(lambda value: plt.figure(), values, name="n", alt="nothing")
    slider = made[-1].children[0]
    assert slider.step == pytest.approx(step) and (slider.min, slider.max) == (values[0], values[-1])


def test_coloured_images_keep_their_colours():
    fig, ax = plt.subplots()
    pictures = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    pictures[0, 0], pictures[1, 2] = 255, 51
    figures.images(ax, pictures, columns=2, levels=256)
    (sheet,) = ax.get_images()
    found = sheet.get_array()
    assert found.shape == (2, 5, 3) and (found[:, 2] == 1).all(), "a white gap of one pixel"
    np.testing.assert_allclose(found[0, [0, 3]], [[1, 0, 0], [0, 0, 0.2]], atol=1e-6)
    plt.close(fig)
