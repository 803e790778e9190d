"""Figures: one style, image grids, film strips, and sliders that need no kernel."""

import base64
import html
import io
import json

import numpy as np
import torch
from torch import Tensor

from minddpm.data import to_uint8

DATA, NOISE, MODEL, EXACT = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito's palette
"""What a colour means on every page: data, noise, the model, a closed form."""


def style() -> None:
    """Set matplotlib's defaults for every figure of the book."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": mpl.cycler(color=[DATA, NOISE, MODEL, "#CC79A7", EXACT, "#E69F00"]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.figsize": (6.4, 3.2),
            "font.size": 10,
            "grid.alpha": 0.3,
            "image.cmap": "gray",
            "legend.frameon": False,
        }
    )


def grid(x: Tensor, columns: int = 8, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W), uint8 or in [-1, 1], as one uint8 picture (rows * H, columns * W, 3).

    C is 1 or 3; each pixel becomes scale x scale; missing tiles stay white.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(
            f"expected images (N, 1 or 3, H, W) with N >= 1, got shape {tuple(x.shape)}"
        )
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be 1 or more, got {columns} and {scale}")
    pixels = x if x.dtype == torch.uint8 else to_uint8(x)
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    h, w = pixels.shape[2:]
    tiles = pixels.new_full((rows * columns, 3, h, w), 255)
    tiles[: len(pixels)] = pixels.expand(-1, 3, -1, -1)
    picture = (
        tiles.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    )
    return picture.cpu().numpy().repeat(scale, 0).repeat(scale, 1)


def sheet(x: Tensor, columns: int = 8) -> bytes:
    """Images (N, C, H, W) as a PNG file: white lines between, small ones enlarged."""
    pixels = x if x.dtype == torch.uint8 else to_uint8(x)
    framed = torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=255)
    return png(grid(framed, columns, scale=max(1, 64 // x.shape[-1])))


def show(x: Tensor, columns: int = 8, title: str | None = None, ax=None):
    """Draw images (N, C, H, W) as a grid without axes, and return the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.figure().gca()
    ax.imshow(grid(x, columns), interpolation="nearest")
    ax.set(title=title)
    ax.axis("off")
    return ax


def film(frames: Tensor, labels: list[str]):
    """Draw frames (K, N, C, H, W) as a strip: a column a frame under its label, a row an image."""
    import matplotlib.pyplot as plt

    if len(frames) != len(labels):
        raise ValueError(
            f"expected one label a frame, got {len(frames)} frames and {len(labels)} labels"
        )
    k, n = frames.shape[:2]
    figure, axes = plt.subplots(1, k, figsize=(0.85 * k, 0.85 * n + 0.35), squeeze=False)
    for ax, frame, label in zip(axes[0], frames, labels, strict=True):
        show(frame, columns=1, title=label, ax=ax)
        ax.title.set_fontsize(9)
    return figure


def snapshot(figure) -> Tensor:
    """A matplotlib figure as pixels (3, H, W) uint8, closed afterwards: a frame for a slider."""
    import matplotlib.pyplot as plt

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Slider:
    """A figure to drag: the frames in one picture, moved under a window by a range input.

    frames: (K, C, H, W), uint8 or in [-1, 1]. labels: one a frame, shown beside the handle. alt:
    what the figure shows, in words. name: of the quantity dragged. scale: screen pixels a pixel.
    start: the frame shown first, and the only one on paper or without scripts.
    """

    HTML = (
        '<figure class="minddpm-slider" style="margin:0">'
        '<img src="data:image/png;base64,{data}" alt="{alt}" style="width:{width}px;'
        "max-width:100%;height:auto;aspect-ratio:{w}/{h};object-fit:cover;"
        "object-position:{position}% 0;"
        'image-rendering:{rendering}"><br><label>{name} <input type="range" min="0" max="{last}" '
        'value="{start}" data-labels="{labels}" aria-label="{name}" aria-valuetext="{label}" '
        'style="width:{width}px;max-width:70%" '
        "oninput=\"const f=this.closest('figure'),l=JSON.parse(this.dataset.labels)[this.value];"
        "f.querySelector('img').style.objectPosition=100*this.value/{last}+'% 0';"
        "f.querySelector('output').value=l;this.setAttribute('aria-valuetext',l)\"> "
        "<output>{label}</output></label></figure>"
    )

    def __init__(
        self,
        frames: Tensor,
        labels: list[str],
        alt: str,
        name: str = "t",
        scale: int = 1,
        start: int = 0,
    ):
        if frames.ndim != 4 or len(frames) < 2 or len(frames) != len(labels):
            raise ValueError(
                f"expected at least two frames (K, C, H, W) and K labels, got "
                f"{tuple(frames.shape)} and {len(labels)} labels"
            )
        if len(frames) * frames.shape[3] > 16_000:
            raise ValueError(
                f"{len(frames)} frames of width {frames.shape[3]} make a picture wider than "
                "browsers take; keep their product within 16,000"
            )
        self.frames, self.labels, self.alt = frames, [str(label) for label in labels], alt
        self.name, self.scale, self.start = name, scale, start

    def _repr_html_(self) -> str:
        h, w = self.frames.shape[2:]
        last, start = len(self.frames) - 1, self.start % len(self.frames)
        return self.HTML.format(
            data=base64.b64encode(png(grid(self.frames, columns=len(self.frames)))).decode(),
            alt=html.escape(self.alt),
            name=html.escape(self.name),
            labels=html.escape(json.dumps(self.labels, ensure_ascii=False)),
            label=html.escape(self.labels[start]),
            rendering="pixelated" if self.scale > 1 else "auto",
            width=w * self.scale,
            w=w,
            h=h,
            last=last,
            start=start,
            position=100 * start / last,
        )

    def __repr__(self) -> str:
        return f"<slider over {self.name}, {len(self.frames)} frames>"


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture (H, W, 3) as the bytes of a PNG file, grey where all its pixels are."""
    from PIL import Image

    grey = (picture == picture[..., :1]).all()
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if grey else picture).save(file, "png", optimize=True)
    return file.getvalue()
