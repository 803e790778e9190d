"""The U-Net of DDPM (DDPM app. B): 35,746,307 parameters as it comes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of t at dim / 2 frequencies from 1 to 1e-4: (B,) -> (B, dim) float32."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def check_input(x: Tensor, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x is (B, *shape) and t is (B,)."""
    if x.shape[1:] != shape:
        raise ValueError(
            f"this network reads a batch of shape (B, {', '.join(map(str, shape))}), "
            f"got {tuple(x.shape)}"
        )
    times = tuple(getattr(t, "shape", ()))
    if times != (len(x),):
        raise ValueError(f"t must have shape ({len(x)},), one time per image, got {times}")


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or in narrow layers fewer: a group of one channel would erase the added time."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


def scaled(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Glorot-uniform weights times sqrt(scale) and no bias; scale 0 makes the layer answer 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale)) if scale else nn.init.zeros_(
        layer.weight
    )
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in: int, c_out: int, kernel: int = 3, scale: float = 1.0) -> nn.Module:
    """A convolution that keeps height and width."""
    return scaled(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), scale)


class ResBlock(nn.Module):
    """Norm, swish, conv, add the time, norm, swish, dropout, conv; plus a shortcut."""

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv(c_in, c_out)
        self.time = scaled(nn.Linear(c_time, c_out))
        self.norm2, self.conv2 = group_norm(c_out), conv(c_out, c_out, scale=0)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention with one head over the H * W pixels; plus a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.query, self.key, self.value = (conv(channels, channels, 1) for _ in range(3))
        self.out = conv(channels, channels, 1, scale=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[
            :, 0
        ]  # (B, H * W, C)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A residual block, followed by attention where asked."""

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float, attend: bool):
        super().__init__()
        self.res = ResBlock(c_in, c_out, c_time, dropout)
        self.attention = Attention(c_out) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.res(x, time))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded on the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = scaled(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """(x_t (B, channels, size, size), t (B,), labels (B,)) -> (B, out_channels, size, size).

    channels, size: of the images. width: channels at full resolution; multipliers: of the width,
    one per resolution, each half the last. blocks: residual blocks per resolution on the way down
    (one more on the way up). attention: the resolutions with attention after each block. dropout:
    its probability. out_channels: channels unless given; 2 * channels for a learned variance.
    classes: labels are 0..classes - 1, and `classes` itself says "no class", as leaving them out
    does; 0 classes, no labels. Raises ValueError where size cannot be halved often enough.
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        out_channels: int | None = None,
        classes: int = 0,
    ):
        super().__init__()
        if size % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"{len(multipliers)} resolutions need a size divisible by "
                f"{2 ** (len(multipliers) - 1)}, got {size}: resize, or take fewer multipliers"
            )
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        self.shape, self.width, c_time = (channels, size, size), width, 4 * width
        self.classes = classes
        self.embed = nn.Sequential(
            scaled(nn.Linear(width, c_time)),
            nn.SiLU(),
            scaled(nn.Linear(c_time, c_time)),
            nn.SiLU(),
        )
        self.first = conv(channels, width)

        c, skips, self.down = width, [width], nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            attend = size >> level in attention
            for _ in range(blocks):
                self.down.append(Block(c, multiplier * width, c_time, dropout, attend))
                c = multiplier * width
                skips.append(c)
            if level < len(multipliers) - 1:
                self.down.append(Downsample(c))
                skips.append(c)

        self.middle = nn.ModuleList(
            [Block(c, c, c_time, dropout, attend=True), Block(c, c, c_time, dropout, attend=False)]
        )

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            attend = size >> level in attention
            for _ in range(blocks + 1):
                self.up.append(Block(c + skips.pop(), multiplier * width, c_time, dropout, attend))
                c = multiplier * width
            if level > 0:
                self.up.append(Upsample(c))

        self.last = nn.Sequential(
            group_norm(c), nn.SiLU(), conv(c, out_channels or channels, scale=0)
        )
        if classes:
            self.labels = nn.Embedding(classes + 1, c_time)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input(x, t, self.shape)
        # The published networks count the first noising step as 0.
        time = time_embedding(t - 1, self.width).to(x.dtype)
        if self.classes:
            none = torch.full_like(t, self.classes, dtype=torch.int64)
            label = self.labels(none if labels is None else labels)
            time = self.embed[-1](self.embed[:-1](time) + label)
        elif labels is None:
            time = self.embed(time)
        else:
            raise ValueError("this network was built without classes: it takes no labels")
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, time)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time)
        for layer in self.up:
            h = (
                layer(h)
                if isinstance(layer, Upsample)
                else layer(torch.cat([h, skips.pop()], 1), time)
            )
        return self.last(h)
