"""Make the moving picture of README.md: a flow that carries noise to data and back.

python book/make_picture.py [FILE]
"""

import io
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import cnfkit as ck
from cnfkit import figures

FILE = Path(__file__).parent / "_static" / "flow.gif"
LAYERS, STEPS_A_LAYER, POINTS = 12, 3, 1800


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    """Where each point is at each frame, shape (frames, points, 2), and its colour."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    kept = ck.mask("even", 2)
    layers = [ck.AffineCoupling(kept if k % 2 == 0 else ~kept, ck.MLP(2, 4)) for k in range(LAYERS)]
    flow = ck.Flow(ck.Normal(2), ck.Chain(*layers))
    data = ck.toy_density("pinwheel").sample(20_000, generator)
    ck.fit(ck.NegativeLogLikelihood(flow), data, steps=3000, batch=256, lr=5e-3)
    z = flow.base.sample(POINTS, generator)
    stages = [z]
    with torch.no_grad():
        for layer in reversed(list(flow.bijection)):
            stages.append(layer.inverse(stages[-1]).value)
    shares = [k / STEPS_A_LAYER for k in range(LAYERS * STEPS_A_LAYER + 1)]
    path = [torch.lerp(stages[int(t)], stages[min(int(t) + 1, LAYERS)], t % 1) for t in shares]
    angle = torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi) + 0.5
    return torch.stack(path), 0.1 + 0.8 * angle  # the ends of the colour map are nearly white


def picture(x: torch.Tensor, colour: torch.Tensor) -> Image.Image:
    fig, ax = plt.subplots(figsize=(4.8, 3.6))
    figures.points(ax, x, (-4.6, 4.6, -3.45, 3.45), color=plt.cm.twilight(colour.numpy()), s=4, alpha=0.9)
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=100)
    plt.close(fig)
    return Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)


def main(file: Path) -> None:
    figures.use_style()
    path, colour = positions()
    there = [picture(x, colour) for x in path]
    frames = there + there[-2:0:-1]
    hold = {0: 1000, len(there) - 1: 2000}  # milliseconds at either end
    file.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        file,
        save_all=True,
        append_images=frames[1:],
        duration=[hold.get(k, 50) for k in range(len(frames))],
        loop=0,
        optimize=True,
    )
    print(f"{file}: {len(frames)} frames, {file.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
