"""Networks: any module (x_t, t) -> tensor will do; these are the book's."""

from minddpm.nets.mlp import MLP
from minddpm.nets.unet import UNet

__all__ = ["MLP", "UNet"]
