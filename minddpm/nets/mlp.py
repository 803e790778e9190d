"""A small network for points in a plane."""

import torch
from torch import Tensor, nn

from minddpm.nets.unet import check_input, time_embedding


class MLP(nn.Module):
    """(x_t (B, dim), t (B,)) -> (B, out_dim): residual layers of `width` units that see the time.

    `layers`: their number. out_dim: dim unless given; 2 * dim for a learned variance.
    """

    def __init__(self, dim: int = 2, width: int = 128, layers: int = 3, out_dim: int | None = None):
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"width must be even and at least 4, got {width}")
        self.shape, self.width = (dim,), width
        self.first, self.time = nn.Linear(dim, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, out_dim or dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        check_input(x, t, self.shape)
        time = self.time(time_embedding(t - 1, self.width).to(x.dtype))
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(torch.nn.functional.silu(h + time))
        return self.last(torch.nn.functional.silu(h))
