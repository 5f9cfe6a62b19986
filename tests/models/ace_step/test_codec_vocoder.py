"""The vocoder against its formulas, written out in fp64 over the official names: no package ships the original."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from longburn.models.ace_step.codecs import Vocoder, VocoderConfig
from longburn.models.ace_step.codecs.geometry import Reach, reach

SMALL = {
    "_class_name": "ADaMoSHiFiGANV1",
    "input_channels": 6,
    "depths": [1, 2],
    "dims": [8, 12],
    "kernel_sizes": [7],
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 5]],
    "num_mels": 12,
    "upsample_initial_channel": 16,
    "pre_conv_kernel_size": 5,
    "post_conv_kernel_size": 7,
    "hop_length": 8,
    "sampling_rate": 44100,
}


def checkpoint(directory: Path) -> dict[str, Tensor]:
    """Random weights under the official names, saved; all of them matter."""
    made = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    def put(name: str, *shape: int, mean: float = 0.0, normalised: bool = False) -> None:
        values = mean + torch.randn(*shape, generator=made) * 0.2
        if normalised:
            tensors[f"{name}_v"] = values
            tensors[f"{name}_g"] = values.norm(dim=(1, 2), keepdim=True) * (1 + 0.2 * torch.rand(1, generator=made))
        else:
            tensors[name] = values

    def norm(name: str, size: int) -> None:
        put(f"{name}.weight", size, mean=1.0)
        put(f"{name}.bias", size)

    dims = SMALL["dims"]
    put("backbone.channel_layers.0.0.weight", dims[0], 6, 7)
    put("backbone.channel_layers.0.0.bias", dims[0])
    norm("backbone.channel_layers.0.1", dims[0])
    norm("backbone.channel_layers.1.0", dims[0])
    put("backbone.channel_layers.1.1.weight", dims[1], dims[0], 1)
    put("backbone.channel_layers.1.1.bias", dims[1])
    norm("backbone.norm", dims[1])
    for i, depth in enumerate(SMALL["depths"]):
        for j in range(depth):
            block = f"backbone.stages.{i}.{j}"
            put(f"{block}.dwconv.weight", dims[i], 1, 7)
            put(f"{block}.dwconv.bias", dims[i])
            norm(f"{block}.norm", dims[i])
            put(f"{block}.pwconv1.weight", 4 * dims[i], dims[i])
            put(f"{block}.pwconv1.bias", 4 * dims[i])
            put(f"{block}.pwconv2.weight", dims[i], 4 * dims[i])
            put(f"{block}.pwconv2.bias", dims[i])
            put(f"{block}.gamma", dims[i])
    put("head.conv_pre.weight", 16, 12, 5, normalised=True)
    put("head.conv_pre.bias", 16)
    for i, rate in enumerate(SMALL["upsample_rates"]):
        put(f"head.ups.{i}.weight", 16 >> i, 8 >> i, 2 * rate, normalised=True)
        put(f"head.ups.{i}.bias", 8 >> i)
        for k, kernel in enumerate(SMALL["resblock_kernel_sizes"]):
            for convs in ("convs1", "convs2"):
                for m in range(2):
                    put(f"head.resblocks.{2 * i + k}.{convs}.{m}.weight", 8 >> i, 8 >> i, kernel, normalised=True)
                    put(f"head.resblocks.{2 * i + k}.{convs}.{m}.bias", 8 >> i)
    put("head.conv_post.weight", 1, 4, 7, normalised=True)
    put("head.conv_post.bias", 1)
    extra = {"mel_transform.spectrogram.window": torch.ones(16), "mel_transform.mel_scale.fb": torch.ones(9, 6)}
    save_file(tensors | extra, directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text(json.dumps(SMALL))
    return {name: tensor.double() for name, tensor in tensors.items()}


def written_out(weights: dict[str, Tensor], mel: Tensor) -> Tensor:
    """The vocoder, step by step."""

    def weight(name: str) -> Tensor:
        if name in weights:
            return weights[name]
        v = weights[f"{name}_v"]
        return v * weights[f"{name}_g"] / v.square().sum((1, 2), keepdim=True).sqrt()

    def conv(name: str, x: Tensor, pad: int, *, dilation: int = 1, groups: int = 1) -> Tensor:
        return F.conv1d(x, weight(f"{name}.weight"), weights[f"{name}.bias"], 1, pad, dilation, groups)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return weights[f"{name}.weight"][:, None] * x + weights[f"{name}.bias"][:, None]

    x = torch.cat([mel[..., :1]] * 3 + [mel] + [mel[..., -1:]] * 3, -1)
    x = norm("backbone.channel_layers.0.1", conv("backbone.channel_layers.0.0", x, 0))
    for i, depth in enumerate(SMALL["depths"]):
        if i:
            x = conv(f"backbone.channel_layers.{i}.1", norm(f"backbone.channel_layers.{i}.0", x), 0)
        for j in range(depth):
            block = f"backbone.stages.{i}.{j}"
            y = norm(f"{block}.norm", conv(f"{block}.dwconv", x, 3, groups=x.shape[1])).transpose(1, 2)
            y = y @ weights[f"{block}.pwconv1.weight"].T + weights[f"{block}.pwconv1.bias"]
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            y = y @ weights[f"{block}.pwconv2.weight"].T + weights[f"{block}.pwconv2.bias"]
            x = x + (weights[f"{block}.gamma"] * y).transpose(1, 2)
    x = conv("head.conv_pre", norm("backbone.norm", x), 2)
    for i, rate in enumerate(SMALL["upsample_rates"]):
        x = x * x.sigmoid()
        x = F.conv_transpose1d(x, weight(f"head.ups.{i}.weight"), weights[f"head.ups.{i}.bias"], rate, rate // 2)
        stacks = []
        for k, (kernel, dilations) in enumerate(
            zip(SMALL["resblock_kernel_sizes"], SMALL["resblock_dilation_sizes"], strict=True)
        ):
            y = x
            for m, dilation in enumerate(dilations):
                block = f"head.resblocks.{2 * i + k}"
                inner = conv(f"{block}.convs1.{m}", y * y.sigmoid(), (kernel - 1) * dilation // 2, dilation=dilation)
                y = y + conv(f"{block}.convs2.{m}", inner * inner.sigmoid(), kernel // 2)
            stacks.append(y)
        x = sum(stacks) / len(stacks)
    return conv("head.conv_post", x * x.sigmoid(), 3).tanh()


@pytest.mark.parametrize("frames", [1, 5, 40])
def test_sounds_as_its_formulas(tmp_path: Path, frames: int) -> None:
    weights = checkpoint(tmp_path)
    mel = torch.randn(2, 6, frames, generator=torch.Generator().manual_seed(1))
    expected = written_out(weights, mel.double())
    assert expected.shape == (2, 1, 8 * frames)
    with torch.no_grad():
        sound = Vocoder.from_checkpoint(tmp_path)(mel)
        torch.testing.assert_close(sound.double(), expected, atol=1e-5, rtol=0)
        exact = Vocoder.from_checkpoint(tmp_path, dtype=torch.float64)(mel.double())
    torch.testing.assert_close(exact, expected, atol=1e-6, rtol=0)  # weights are folded in fp32


def test_windows_give_the_same(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    vocoder = Vocoder.from_checkpoint(tmp_path, dtype=torch.float64)
    mel = torch.randn(2, 6, 200, dtype=torch.float64, requires_grad=True)
    margin = reach(vocoder.path, inputs=1, outputs=8)
    whole = vocoder(mel)
    (gradient,) = torch.autograd.grad(whole[..., 800:808].square().sum(), mel)
    touched = gradient.abs().sum((0, 1)).nonzero()[:, 0]
    assert (100 - int(touched.min()), int(touched.max()) - 100) == margin
    for window in (sum(margin) + 1, sum(margin) + 2, 150):
        pieces = list(vocoder.stream(mel, window=window))
        assert len(pieces) > 1
        torch.testing.assert_close(torch.cat(pieces, -1), whole.detach(), atol=1e-12, rtol=0)


def test_the_released_sizes_are_the_default() -> None:
    with torch.device("meta"):
        vocoder = Vocoder()
        assert vocoder(torch.empty(1, 128, 10)).shape == (1, 1, 5120)
    assert sum(parameter.numel() for parameter in vocoder.parameters()) / 1e6 == pytest.approx(103.0, abs=0.1)
    assert reach(vocoder.path, inputs=1, outputs=512) == Reach(91, 91)


def test_wrong_settings_are_named() -> None:
    for config, message in (
        ({"_class_name": "HiFiGAN"}, "the vocoder is 'HiFiGAN'"),
        ({"mels": 3}, "'mels' is not known"),
        ({"use_template": True}, "use_template is True"),
        ({"hop_length": 256}, "hop_length is 256 where the other sizes want 512"),
        ({"num_mels": 128}, "num_mels is 128 where the other sizes want 512"),
        ({"upsample_kernel_sizes": [16, 8, 4, 4, 4, 4, 4]}, "upsample_kernel_sizes"),
        ({"upsample_rates": [8, 1, 4, 4, 2, 2], "upsample_kernel_sizes": [16, 2, 8, 8, 4, 4]}, "wanted even rates"),
    ):
        with pytest.raises(ValueError, match=message):
            VocoderConfig.from_config(config)
