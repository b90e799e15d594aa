"""Figures in one style, and pictures that move: in the book without a kernel, in JupyterLab live.

The colours are Okabe and Ito's, which readers with any kind of colour vision can tell apart. Throughout the course
data are blue and latents are vermilion.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cnfkit.settings import in_kernel, live

DATA, LATENT = "#0072B2", "#D55E00"  # blue and vermilion
CYCLE = [DATA, LATENT, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#cfe3f2", "#6fb0dc", DATA, "#00304d"])
STYLE = {
    "axes.prop_cycle": plt.cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 13,  # still legible when a figure as wide as the page is shown on a phone
    "image.cmap": "gray_r",
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.facecolor": "white",
}


def use_style() -> None:
    """Give every figure from here on the course's style."""
    plt.rcParams.update(STYLE)


def show(fig: Figure, alt: str, caption: str = "") -> None:
    """Show a figure with a text that stands for it, and a caption below.

    Args:
        fig: the figure; it is closed.
        alt: what the figure shows, for readers who do not see it.
        caption: what to notice, in Markdown.

    Raises:
        ValueError: if ``alt`` is empty.
    """
    _require_alt(alt)
    data = base64.b64encode(_small(_render(fig, "png", dpi=130))).decode()
    _display({"image/png": data, "text/plain": alt}, metadata={"image/png": {"alt": alt}})
    _show_caption(caption)


def explore(
    draw: Callable[[float], Figure],
    values: Sequence[float],
    name: str,
    alt: str,
    caption: str = "",
    start: int = 0,
    play: bool = False,
) -> None:
    """A picture with a slider: stored frames in the book, a live ipywidgets control in JupyterLab.

    Args:
        draw: makes the figure for one value; it is called once per stored frame, and live at each move.
        values: the values of the stored frames, increasing; live, every value between the first and last can be had.
        name: what the slider changes.
        alt: what the picture shows, for readers who do not see it; the value is added.
        caption: what to notice, in Markdown.
        start: which of the values is shown first.
        play: whether the stored frames have a button that plays them in turn.

    Raises:
        ValueError: if there are fewer than two values, ``start`` is none of them, or ``alt`` is empty.
    """
    _require_alt(alt)
    if len(values) < 2 or not 0 <= start < len(values):
        raise ValueError(f"values has {len(values)} entries and start is {start}; wanted at least 2, and one of them")
    if live():
        _control(draw, [float(value) for value in values], name, alt, start)
    elif in_kernel():
        page = frames((draw(value) for value in values), [f"{value:.3g}" for value in values], name, alt, start, play)
        _display({"text/html": page, "text/plain": f"{alt} ({name}: {values[0]:.3g} to {values[-1]:.3g})"})
    _show_caption(caption)


def _show_caption(caption: str) -> None:
    if caption:
        _display({"text/markdown": f"*{caption}*", "text/plain": caption})


def _display(data: dict[str, str], **options) -> None:
    """Show one output in its several forms, where there is a notebook to show it in."""
    if in_kernel():
        from IPython.display import display

        display(data, raw=True, **options)


def frames(
    figs: Iterable[Figure], labels: Sequence[str], name: str, alt: str, start: int = 0, play: bool = False
) -> str:
    """HTML of stored frames under a slider: no kernel, no script file, no network, the same bytes at every run.

    Args:
        figs: the figures, which are closed one by one.
        labels: the value that each stands for.
        name: what the slider changes.
        alt: what the pictures show.
        start: the frame that is shown first.
        play: whether there is a button that plays them in turn.

    Raises:
        ValueError: if ``alt`` is empty, ``start`` is none of the frames, or there are not as many labels as figures.
    """
    _require_alt(alt)
    if not 0 <= start < len(labels):
        raise ValueError(f"start is {start} of {len(labels)} frames; wanted one of them")
    images = []
    for k, (fig, label) in enumerate(zip(figs, labels, strict=True)):
        data = base64.b64encode(_render(fig, "webp", dpi=100, pil_kwargs={"quality": 82, "method": 6})).decode()
        text = html.escape(f"{alt} ({name} = {label})", quote=True)
        hidden = "" if k == start else "display:none;"
        images.append(
            f'<img style="{hidden}max-width:100%" alt="{text}" data-label="{html.escape(label)}" '
            f'src="data:image/webp;base64,{data}">'
        )
    title = html.escape(name, quote=True)
    button = f'<button type="button" aria-label="play" onclick="{_PLAY}">▶</button> ' if play else ""
    return (
        '<figure class="cnfkit-frames" style="margin:0">'
        + "".join(images)
        + f'<div style="display:flex;gap:.6em;align-items:center;font-size:.95em">{button}'
        + f'<input type="range" style="flex:1;max-width:24em" min="0" max="{len(images) - 1}" value="{start}" '
        + f'aria-label="{title}" oninput="{_MOVE}"><span>{title} = <output>{html.escape(labels[start])}</output></span>'
        + "</div></figure>"
    )


# Handlers that find their own figure: no identifiers, so a picture can be shown twice, and a re-run changes no byte.
_MOVE = (
    "const f=this.closest('figure');f.querySelectorAll('img').forEach((m,i)=>{const on=i==this.value;"
    "m.style.display=on?'':'none';if(on)f.querySelector('output').textContent=m.dataset.label})"
)
_PLAY = (
    "const s=this.closest('figure').querySelector('input');if(this.timer){clearInterval(this.timer);this.timer=0;"
    "this.textContent='▶';return}this.textContent='⏸';this.timer=setInterval(()=>{s.value=(+s.value+1)%(+s.max+1);"
    "s.oninput()},250)"
)


def _control(draw: Callable[[float], Figure], values: list[float], name: str, alt: str, start: int) -> None:
    import ipywidgets
    from IPython.display import display

    whole = all(value.is_integer() for value in values)  # numbers of layers, say, have nothing between
    slider = ipywidgets.FloatSlider(
        value=values[start],
        min=values[0],
        max=values[-1],
        step=1 if whole else (values[-1] - values[0]) / 100,
        readout_format=".0f" if whole else ".2f",
        description=name,
        continuous_update=False,
        style={"description_width": "initial"},
    )
    picture = ipywidgets.interactive_output(
        lambda value: show(draw(value), f"{alt} ({name} = {value:.3g})"), {"value": slider}
    )
    display(ipywidgets.VBox([slider, picture]))


def _require_alt(alt: str) -> None:
    if not alt.strip():
        raise ValueError("alt is empty; say in a sentence what the figure shows")


def _render(fig: Figure, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, **options)
    plt.close(fig)
    return buffer.getvalue()


def _small(png: bytes) -> bytes:
    """The picture in the 256 colours that suit it: the same to the eye, in half of the bytes."""
    picture, buffer = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def density(ax: Axes, log_prob: Callable[[Tensor], Tensor], limits: Sequence[float], n: int = 150, **options) -> Tensor:
    """Draw a density on the plane as a heat map.

    Args:
        ax: where.
        log_prob: the log-density of points of shape ``(m, 2)``.
        limits: left, right, bottom, top.
        n: points along each side.
        options: for ``imshow``.

    Returns:
        The density on the grid, shape ``(n, n)``, rows from bottom to top.
    """
    left, right, bottom, top = limits
    x, y = torch.linspace(left, right, n), torch.linspace(bottom, top, n)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    with torch.no_grad():
        values = log_prob(points).exp().reshape(n, n).cpu()
    options = {"cmap": DENSITY, "vmin": 0, "origin": "lower", "extent": limits, "aspect": "equal"} | options
    ax.imshow(values.numpy(), **options)
    bare(ax)
    return values


def points(ax: Axes, x: Tensor, limits: Sequence[float] | None = None, **options) -> None:
    """Draw points on the plane.

    Args:
        ax: where.
        x: the points, shape ``(n, 2)``.
        limits: left, right, bottom, top; around the points unless given.
        options: for ``scatter``.
    """
    x = x.detach().cpu().numpy()
    ax.scatter(x[:, 0], x[:, 1], **({"s": 4, "alpha": 0.5, "linewidths": 0, "color": DATA} | options))
    if limits is not None:
        ax.axis(limits)
    ax.set_aspect("equal")
    bare(ax)


def grid(ax: Axes, transform: Callable[[Tensor], Tensor], limits: Sequence[float], lines: int = 17, **options) -> None:
    """Draw the image of a square grid under a map of the plane.

    Args:
        ax: where.
        transform: maps points of shape ``(m, 2)``.
        limits: left, right, bottom, top of the grid before the map.
        lines: grid lines each way.
        options: for ``plot``.
    """
    left, right, bottom, top = limits
    fine = np.linspace(0, 1, 200)
    for share in np.linspace(0, 1, lines):
        upright = (np.full_like(fine, left + share * (right - left)), bottom + fine * (top - bottom))
        level = (left + fine * (right - left), np.full_like(fine, bottom + share * (top - bottom)))
        for x, y in (upright, level):
            with torch.no_grad():
                image = transform(torch.tensor(np.stack([x, y], -1), dtype=torch.get_default_dtype()))
            image = image.cpu().numpy()
            ax.plot(image[:, 0], image[:, 1], **({"color": "#555555", "linewidth": 0.7} | options))
    ax.set_aspect("equal")
    bare(ax)


def images(ax: Axes, pictures: Tensor, columns: int = 10, levels: int = 2, **options) -> None:
    """Draw grey or coloured images as one sheet.

    Args:
        ax: where.
        pictures: shape ``(n, 1, height, width)``, or three channels for red, green and blue, with values from 0 to
            ``levels - 1``.
        columns: how many stand in a row.
        levels: how many values a pixel takes.
        options: for ``imshow``.

    Raises:
        ValueError: if ``pictures`` has another shape, or none are in it.
    """
    if pictures.dim() != 4 or pictures.shape[1] not in (1, 3) or not len(pictures):
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}; wanted (n, 1 or 3, height, width)")
    n, channels, height, width = pictures.shape
    rows = -(-n // columns)
    gap = 0.0 if channels == 1 else levels - 1.0  # white, also where 0 is black
    sheet = torch.full((rows * columns, height + 1, width + 1, channels), gap)
    sheet[:n, :-1, :-1] = pictures.movedim(1, -1).float().cpu()
    sheet = sheet.view(rows, columns, height + 1, width + 1, channels).transpose(1, 2)
    sheet = sheet.reshape(rows * (height + 1), -1, channels)[:-1, :-1]
    sheet = sheet[..., 0] if channels == 1 else (sheet / (levels - 1)).clamp(0, 1)
    ax.imshow(sheet.numpy(), **({"vmin": 0, "vmax": levels - 1, "interpolation": "nearest"} | options))
    bare(ax)


def bare(ax: Axes) -> None:
    """Take away ticks and frame, where the numbers on the axes say nothing.

    Args:
        ax: whose.
    """
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
