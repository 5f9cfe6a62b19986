"""The layers of the Wan 2.1 VAE, on frames `[B, T, H, W, C]`.

Channels come last, in weights too: so convolutions read whole rows of channels, and
those over channels alone, or over channels and time, are matrix products. A convolution over time looks back only, at
frames that a `Pass` remembers; where it is over pixels too, its frames lie side by side, as channels of one picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.kernels.frames import REMEMBERED, add_frames, norm_eps, norm_frames
from longburn.kernels.norm import rms_norm
from longburn.models.matrix_game_2.vae_memory import Pass


class CausalConv(nn.Module):
    """A convolution over 3 x 3 pixels of a frame and the two before it; weights `[out, height, width, time * in]`."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, 3, 3, 3 * channels) * (27 * channels) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """`[B, T, H, W, 3 C]`, `side_by_side`, to `[B, T, H, W, out]`; without bias, it is the caller's to add."""
        return over_pictures(x, self.weight, self.bias if bias else None)


class PictureConv(nn.Module):
    """A convolution over 3 x 3 pixels of each frame."""

    def __init__(
        self, channels: int, out_channels: int, stride: int = 1, padding: int = 1, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, 3, 3, channels) * (9 * channels) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T, H', W', out]`."""
        return over_pictures(x, self.weight, self.bias, self.stride, self.padding)


class TimeConv(nn.Module):
    """A convolution over three frames of each pixel, at every `stride`-th of them."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, 3, 1, 1, channels) * (3 * channels) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.stride = (stride, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 2 + T, H, W, C]` to `[B, ceil(T / stride), H, W, out]`."""
        weight, frames = self.weight.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3)
        return F.conv3d(frames, weight, self.bias, self.stride).permute(0, 2, 3, 4, 1).contiguous()


class Norm(nn.Module):
    """The weight of an RMSNorm over channels; its epsilon is next to nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same."""
        return rms_norm(x, self.weight, norm_eps(x.shape[-1]), round_last=True)

    def activated(self, x: Tensor, step: Pass, bias: Tensor | None = None) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T, H, W, 3 C]`: normed, through SiLU, and beside what came before."""
        return norm_frames(x, self.weight, step.take(x, REMEMBERED), bias=bias)


class ResidualBlock(nn.Module):
    """`x` plus two causal convolutions, each of its input normed and activated."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), CausalConv(channels, out_channels)
        self.norm2, self.conv2 = Norm(out_channels), CausalConv(out_channels, out_channels)
        self.shortcut = nn.Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T, H, W, out]`."""
        y = self.norm1.activated(x, step)  # one name, so that nothing lives longer than the next operation
        y = self.conv1.forward(y, bias=False)
        y = self.norm2.activated(y, step, self.conv1.bias)
        y = self.conv2.forward(y, bias=False)
        return add_frames(y, self.shortcut(x), self.conv2.bias)


class FrameAttention(nn.Module):
    """`x` plus attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to the same."""
        B, T, H, W, _ = x.shape
        q, k, v = self.qkv.forward(self.norm.forward(x)).view(B * T, 1, H * W, -1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).view(x.shape)
        return x + self.out.forward(y)


class MoreFrames(nn.Module):
    """From the second frame of a stream on twice the frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = TimeConv(channels, 2 * channels)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T or 2 T, H, W, C]`."""
        if step.first:
            step.take(x, REMEMBERED)  # the first frame goes by: the second one sees zeros before it
            return x
        return interleaved(self.conv.forward(step.extend(x, REMEMBERED)), 2)


class Larger(nn.Module):
    """Twice the height and width, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = PictureConv(channels, channels // 2)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T, 2 H, 2 W, C / 2]`."""
        return self.conv.forward(twice_as_large(x))


class Smaller(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = PictureConv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T, H / 2, W / 2, C]`."""
        return self.conv.forward(F.pad(x, (0, 0, 0, 1, 0, 1)))  # to the right and below


class FewerFrames(nn.Module):
    """From the second frame of a stream on half the frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels, stride=2)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]`, T even but for the first frame, to `[B, T or T / 2, H, W, C]`."""
        y = step.extend(x, 1)
        return x if step.first else self.conv.forward(y)


def over_pictures(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1) -> Tensor:
    """A convolution of each of the pictures `[B, T, H, W, C]` with weights `[out, height, width, C]`."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
    y = F.conv2d(pictures, weight.permute(0, 3, 1, 2), bias, stride, padding).permute(0, 2, 3, 1)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def twice_as_large(x: Tensor) -> Tensor:
    """`[B, T, H, W, C]` to `[B, T, 2 H, 2 W, C]`: every pixel four times."""
    B, T, H, W, C = x.shape
    return x[:, :, :, None, :, None].expand(B, T, H, 2, W, 2, C).reshape(B, T, 2 * H, 2 * W, C)


def interleaved(x: Tensor, frames: int) -> Tensor:
    """`[B, T, H, W, frames * C]` to `[B, T * frames, H, W, C]`: frames that lie side by side, one after the other."""
    B, T, H, W, C = x.shape
    return x.view(B, T, H, W, frames, C // frames).movedim(-2, 2).flatten(1, 2)
