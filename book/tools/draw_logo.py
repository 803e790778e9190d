"""Draw the logo and the icon, book/_static/*.svg: one real digit, dissolving into noise."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

STATIC = Path(__file__).resolve().parents[1] / "_static"
DIGIT, COLOUR = 13, "#3d7ebf"  # a three; a blue that stands out on white and on black alike
TIMES = (0.0, 0.35, 0.75)  # share of noise in each tile of the logo


def noised(share: float, seed: int) -> np.ndarray:
    """The digit in [0, 1], `share` of it replaced by noise."""
    digit = load_digits().images[DIGIT] / 16
    noise = np.random.default_rng(seed).uniform(size=digit.shape)
    return (1 - share) * digit + share * noise


def squares(image: np.ndarray, left: int = 0) -> str:
    """One rounded square a pixel, as opaque as the pixel is bright."""
    return "\n".join(
        f'<rect x="{left + 8 * x}" y="{8 * y}" width="7" height="7" rx="1.5" opacity="{v:.2f}"/>'
        for (y, x), v in np.ndenumerate(image)
        if v > 0.06
    )


def write(name: str, width: int, body: str) -> None:
    """Wrap the squares into a picture."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 63" fill="{COLOUR}">'
    (STATIC / name).write_text(f"{head}\n{body}\n</svg>\n", encoding="utf-8")


def main() -> None:
    """The logo shows three times of the forward process, the icon all of it from left to right."""
    tiles = [squares(noised(share, seed=1), 76 * i) for i, share in enumerate(TIMES)]
    write("logo.svg", 76 * len(TIMES) - 13, "\n".join(tiles))
    share = np.clip(np.linspace(-0.35, 0.85, 8), 0, 1)[None, :]
    write("favicon.svg", 63, squares((1 - share) * noised(0, 1) + share * noised(1, 1)))


if __name__ == "__main__":
    main()
