"""The blocks of the deep compression autoencoder, on pictures `[B, C, H, W]`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """RMSNorm over channels, with weight and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to the same."""
        power = x.float().square().mean(1, keepdim=True)
        return x * torch.rsqrt(power + 1e-5).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResidualBlock(nn.Module):
    """`x` plus the norm of two convolutions of 3 x 3 with a SiLU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to the same."""
        return x + self.norm.forward(self.conv2.forward(F.silu(self.conv1.forward(x))))


class Scale(nn.Module):
    """Queries, keys and values of a coarser scale: a convolution a channel, then one within each group of d
    channels."""

    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3 * channels, H, W]` to the same."""
        return self.mix.forward(self.near.forward(x))


class MultiscaleAttention(nn.Module):
    """`x` plus ReLU linear attention over the picture, with heads at several scales (arXiv 2205.14756).

    Channels of the fused projection are taken in threes of `head_dim`: q, k and v of the first head, of the second, ...
    """

    def __init__(self, channels: int, head_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.scales = nn.ModuleList(Scale(3 * inner, 3 * heads, kernel) for kernel in kernels)
        self.out = nn.Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to the same."""
        B, _, H, W = x.shape
        qkv = self.qkv.forward(x.movedim(1, -1)).movedim(-1, 1)
        every = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], 1).float()
        q, k, v = every.view(B, -1, 3, self.head_dim, H * W).unbind(2)
        q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 0, 0, 1), value=1.0)  # the row of ones sums the denominator
        total = (v @ k.transpose(-1, -2)) @ q
        heads = (total[:, :, :-1] / (total[:, :, -1:] + 1e-15)).to(x.dtype)
        out = self.out.forward(heads.reshape(B, -1, H, W).movedim(1, -1)).movedim(-1, 1)
        return x + self.norm.forward(out)


class GatedConv(nn.Module):
    """`x` plus the norm of a gated feed-forward with a convolution of 3 x 3 a channel inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, 8 * channels, 1)
        self.near = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.narrow = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to the same."""
        value, gate = self.near.forward(F.silu(self.widen.forward(x))).chunk(2, 1)
        return x + self.norm.forward(self.narrow.forward(value * F.silu(gate)))


def mean_of_groups(x: Tensor, groups: int) -> Tensor:
    """`[B, C, H, W]` to `[B, groups, H, W]`: the means of neighbouring channels."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).mean(2)


class Down(nn.Module):
    """Half the size: a convolution, plus the means of the channels into which 2 x 2 neighbours unfold."""

    def __init__(self, channels: int, out_channels: int, unshuffle: bool) -> None:
        super().__init__()
        self.unshuffle, self.out_channels = unshuffle, out_channels
        made, stride = (out_channels // 4, 1) if unshuffle else (out_channels, 2)
        self.conv = nn.Conv2d(channels, made, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to `[B, out_channels, H / 2, W / 2]`."""
        made = self.conv.forward(x)
        made = F.pixel_unshuffle(made, 2) if self.unshuffle else made
        return made + mean_of_groups(F.pixel_unshuffle(x, 2), self.out_channels)


class Up(nn.Module):
    """Twice the size: a convolution, plus every channel folded out to 2 x 2 neighbours."""

    def __init__(self, channels: int, out_channels: int, shuffle: bool) -> None:
        super().__init__()
        self.shuffle, self.copies = shuffle, 4 * out_channels // channels
        self.conv = nn.Conv2d(channels, out_channels * 4 if shuffle else out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to `[B, out_channels, 2 H, 2 W]`."""
        if self.shuffle:
            made = F.pixel_shuffle(self.conv.forward(x), 2)
        else:
            made = self.conv.forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        return made + F.pixel_shuffle(x.repeat_interleave(self.copies, 1), 2)
