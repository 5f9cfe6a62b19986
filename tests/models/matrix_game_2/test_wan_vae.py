"""The Wan VAE against diffusers' `AutoencoderKLWan` with random weights, whole and streamed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_vae_peers import decoded_by, encoded_by, peer_of

from longburn.models.matrix_game_2.vae import FrameMemory, Pass, WanVae, WanVaeConfig
from longburn.models.matrix_game_2.vae_blocks import Larger, ResidualBlock, Smaller
from longburn.models.matrix_game_2.vae_memory import to_uint8
from longburn.models.matrix_game_2.vae_recorded import RecordedDecoder

SIZES: list[dict[str, Any]] = [
    {},
    {"dim_mult": [1, 3, 2], "temperal_downsample": [True, False], "num_res_blocks": 1, "z_dim": 3},
    {"dim_mult": [1, 2, 4], "temperal_downsample": [True, True], "num_res_blocks": 3, "base_dim": 6},
]


def pair(tmp_path: Path, **sizes: Any) -> tuple[Any, WanVae]:
    torch.manual_seed(0)
    peer = peer_of(**sizes)
    peer.save_pretrained(tmp_path)
    return peer, WanVae.from_checkpoint(tmp_path)


def close(came: Tensor, wanted: Tensor) -> None:
    assert came.shape == wanted.shape
    assert float((came - wanted).abs().max() / wanted.abs().max()) <= 1e-5


@pytest.mark.parametrize("sizes", SIZES)
def test_decodes_as_diffusers(sizes: dict[str, Any], tmp_path: Path) -> None:
    peer, vae = pair(tmp_path, **sizes)
    z = torch.randn(2, vae.config.z_dim, 4, 3, 5)
    wanted = decoded_by(peer, z)
    assert wanted.shape[2] == 1 + 3 * vae.config.time_factor
    assert float((wanted.abs() < 1).float().mean()) > 0.5, "most pixels are clamped"
    close(vae.decode(z), wanted)


def test_encodes_as_diffusers(tmp_path: Path) -> None:
    peer, vae = pair(tmp_path)
    pictures = torch.rand(2, 3, 13, 24, 40) * 2 - 1
    close(vae.encode(pictures), encoded_by(peer, pictures))


def test_a_stream_cut_anywhere_is_one_call_bit_for_bit(tmp_path: Path) -> None:
    _, vae = pair(tmp_path)
    z, pictures = torch.randn(1, 4, 7, 3, 5), torch.rand(1, 3, 25, 24, 40) * 2 - 1
    whole, latents = vae.decode(z), vae.encode(pictures)
    for cut in ((1, 1, 1, 1, 1, 1, 1), (2, 1, 4), (1, 6)):
        memory = FrameMemory()
        assert torch.equal(torch.cat([vae.decode(part, memory) for part in z.split(cut, 2)], 2), whole)
        assert memory.frames == 7
        memory = FrameMemory()
        cuts = [1 + 4 * (cut[0] - 1), *(4 * n for n in cut[1:])]
        assert torch.equal(torch.cat([vae.encode(part, memory) for part in pictures.split(cuts, 2)], 2), latents)


def test_memory_is_constant_and_bounded_by_two_frames_a_convolution() -> None:
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    memory = FrameMemory()
    for frame in range(6):
        vae.decode(torch.randn(1, 2, 1, 2, 3), memory)
        if frame == 1:
            places, size = [tensor.data_ptr() for tensor in memory.tensors], memory.nbytes
    assert [tensor.data_ptr() for tensor in memory.tensors] == places
    assert memory.nbytes == size
    assert len(memory.tensors) == 32
    assert {tensor.shape[1] for tensor in memory.tensors} == {2}


def test_a_reset_stream_is_a_new_one() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    z, pictures, memory = torch.randn(1, 2, 3, 2, 3), torch.rand(1, 3, 9, 16, 24), FrameMemory()
    wanted = vae.decode(z)
    vae.decode(torch.randn(1, 2, 4, 2, 3), memory)
    places = [tensor.data_ptr() for tensor in memory.tensors]
    memory.reset()
    assert torch.equal(vae.decode(z, memory), wanted)
    assert [tensor.data_ptr() for tensor in memory.tensors] == places
    wanted, memory = vae.encode(pictures), FrameMemory()
    vae.encode(torch.rand(1, 3, 5, 16, 24), memory)
    memory.reset()
    assert torch.equal(vae.encode(pictures, memory), wanted)


def test_rows_know_nothing_of_each_other() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    z, memory = torch.randn(3, 2, 4, 2, 3), FrameMemory()
    together = vae.decode(z)
    torch.testing.assert_close(together[1:2], vae.decode(z[1:2]), atol=1e-4, rtol=0)
    z[0, :, 1:] = torch.nan
    poisoned = torch.cat([vae.decode(part, memory) for part in z.split(1, 2)], 2)
    assert poisoned[0, :, 1:].isnan().all()
    assert torch.equal(poisoned[1:], together[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    _, vae = pair(tmp_path)
    z, pictures = torch.randn(1, 4, 3, 3, 5), torch.rand(1, 3, 5, 24, 40) * 2 - 1
    half = WanVae.from_checkpoint(tmp_path, dtype=dtype)
    assert half.decoder.std.dtype == torch.float32
    tolerance = 0.02 if dtype == torch.float16 else 0.15
    decoded, encoded = half.decode(z.to(dtype)), half.encode(pictures.to(dtype))
    assert decoded.dtype == encoded.dtype == dtype
    torch.testing.assert_close(decoded.float(), vae.decode(z), atol=tolerance, rtol=0)
    torch.testing.assert_close(encoded.float(), vae.encode(pictures), atol=tolerance, rtol=0)


@pytest.mark.parametrize("sizes", SIZES)
def test_grey_frames_reach_a_steady_state_that_stands_for_any_length(sizes: dict[str, Any], tmp_path: Path) -> None:
    peer, vae = pair(tmp_path, **sizes)
    pace, factor = vae.config.time_factor, vae.config.space_factor
    image = torch.rand(1, 3, factor, 2 * factor) * 2 - 1
    start = vae.encode_start(image)
    known = start.shape[2]
    video = torch.cat([image[:, :, None], torch.zeros(1, 3, (known + 7) * pace, *image.shape[2:])], 2)
    wanted = vae.encode(video)
    assert wanted.shape[2] == known + 8
    assert torch.equal(start, wanted[:, :, :known])
    assert torch.equal(start[:, :, -1:].expand(-1, -1, 8, -1, -1), wanted[:, :, known:])
    if not sizes:
        assert known == 30  # 112 pictures are 28 latent frames; the 29th sees no picture but grey ones
        close(wanted, encoded_by(peer, video))


def test_the_encoder_looks_back_as_far_as_it_says_and_no_farther() -> None:
    """A change of one old picture reaches the last latent frame exactly within `encoder_reach`."""
    torch.manual_seed(0)
    config = WanVaeConfig(
        base_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1, z_dim=2,
        latents_mean=(0, 0), latents_std=(1, 1),
    )  # fmt: skip
    vae = WanVae(config).double()
    vae.decoder.std = vae.decoder.std.double()
    last = 4 * (config.encoder_reach // 2)
    pictures = torch.rand(1, 3, 1 + last, 4, 6, dtype=torch.float64)
    wanted = vae.encode(pictures)[:, :, -1]
    for age, reaches in ((config.encoder_reach, True), (config.encoder_reach + 1, False)):
        changed = pictures.clone()
        changed[:, :, last - age] += 0.5
        assert bool((vae.encode(changed)[:, :, -1] != wanted).any()) is reaches


def test_the_released_sizes_are_the_default() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae, peer = WanVae(), AutoencoderKLWan()
    assert sum(p.numel() for p in vae.parameters()) == sum(p.numel() for p in peer.parameters()) == 126_892_531
    assert sum(p.numel() for p in vae.decoder.parameters()) == 73_295_603
    assert WanVaeConfig.from_config(peer.config) == WanVaeConfig()
    assert (WanVaeConfig().space_factor, WanVaeConfig().time_factor, WanVaeConfig().encoder_reach) == (8, 4, 112)


def test_off_cuda_a_recorded_decoder_is_the_decoder() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    z, memory = torch.randn(1, 2, 3, 2, 3), FrameMemory()
    recorded = RecordedDecoder(vae.decoder)
    recorded.prepare(memory, batch=1, height=2, width=3)
    assert torch.equal(recorded.decode(z, memory), vae.decode(z))
    assert memory.frames == 3


def test_bytes_to_show() -> None:
    pictures = torch.tensor([-2.0, -1.0, -0.003, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 1, 7).expand(1, 3, 2, 1, 7)
    shown = to_uint8(pictures)
    assert shown.shape == (1, 2, 1, 7, 3)
    assert shown.dtype == torch.uint8
    assert shown[0, 0, 0, :, 1].tolist() == [0, 0, 127, 128, 191, 255, 255]


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    memory, grey = FrameMemory(), FrameMemory()
    z = torch.randn(1, 2, 3, 2, 3)
    vae.decode(z[:, :, :1], memory)
    vae.encode(torch.zeros(1, 3, 1, 16, 24), grey)
    kept = [tensor.clone() for tensor in memory.tensors]
    for latents, message in (
        (torch.zeros(1, 2, 2, 3), r"\[1, 2, 2, 3\], wanted \[B, 2, F, h, w\]"),
        (torch.zeros(1, 3, 1, 2, 3), r"wanted \[B, 2, F, h, w\]"),
        (torch.zeros(1, 2, 0, 2, 3), r"wanted \[B, 2, F, h, w\]"),
        (
            torch.zeros(1, 2, 1, 3, 3),
            r"frames \[1, 2, 3, 3\].*, but this FrameMemory is of WanDecoder\.decode with frames \[1, 2, 2, 3\]",
        ),
        (torch.zeros(2, 2, 1, 2, 3), "use one for each model, size, batch and direction"),
        (torch.zeros(1, 2, 1, 2, 3, dtype=torch.float64), "float64 on cpu, the decoder is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.decode(latents, memory)
    for shape, message in (
        ((1, 3, 4, 16, 23), "16 x 23, wanted multiples of 8"),
        ((1, 3, 5, 16, 24), "5 pictures after 1 latent frames, wanted a multiple of 4"),
        ((1, 3, 4, 24, 24), r"is of WanVae\.encode with frames \[1, 3, 16, 24\]"),
        ((1, 4, 4, 16, 24), r"wanted \[B, 3, n, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.encode(torch.zeros(shape), grey)
    with pytest.raises(ValueError, match=r"4 pictures after 0 latent frames, wanted 1 \+ a multiple of 4"):
        vae.encode(torch.zeros(1, 3, 4, 16, 24))
    with pytest.raises(ValueError, match=r"wanted \[B, 3, H, W\]"):
        vae.encode_start(torch.zeros(1, 3, 1, 16, 24))
    with pytest.raises(ValueError, match=r"WanVae\.encode: .* is of WanDecoder\.decode"):
        vae.encode(torch.zeros(1, 3, 4, 16, 24), memory)
    for base in (4, 8):  # of the same sizes, too
        other = WanVae(WanVaeConfig(base_dim=base, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
        with pytest.raises(ValueError, match=r"WanDecoder\.decode of another model .*use one for each model"):
            other.decode(z[:, :, 1:], memory)
    assert all(torch.equal(a, b) for a, b in zip(kept, memory.tensors, strict=True))
    assert torch.equal(vae.decode(z[:, :, 1:], memory), vae.decode(z)[:, :, 1:])


def test_large_pictures_come_one_at_a_time() -> None:
    """Four at once would take much more memory in the layers where pictures are largest."""
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    most: dict[str, int] = {}
    for name, block in vae.named_modules():
        if isinstance(block, (ResidualBlock, Larger, Smaller)):
            block.register_forward_pre_hook(
                lambda block, given, name=name: most.update({name: max(most.get(name, 0), given[0].shape[1])})
            )
    vae.encode(torch.rand(1, 3, 9, 16, 24))
    vae.decode(torch.randn(1, 2, 3, 2, 3))
    large = ("encoder.stages.0", "encoder.stages.1", "encoder.downs.0", "encoder.downs.1")
    large += ("decoder.ups.1", "decoder.ups.2", "decoder.stages.2", "decoder.stages.3")
    found = {name: frames for name, frames in most.items() if name.startswith(large)}
    assert len(found) == 2 * 2 + 2 + 2 + 2 * 3
    assert set(found.values()) == {1}


def test_memory_is_whole_before_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it would lie scattered among what that pass needs only once."""
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    memory, found = FrameMemory(), []
    decode_frame = vae.decoder.decode_frame

    def spy(latent: Tensor, step: Pass) -> Tensor:
        found.append((latent.device.type, [(tensor.shape, tensor.dtype, tensor.device) for tensor in memory.tensors]))
        return decode_frame(latent, step)

    monkeypatch.setattr(vae.decoder, "decode_frame", spy)
    vae.decode(torch.randn(1, 2, 2, 2, 3), memory)
    kept = [(tensor.shape, tensor.dtype, tensor.device) for tensor in memory.tensors]
    assert found == [("meta", []), ("cpu", kept), ("cpu", kept)]


def test_a_decoder_that_cannot_go_without_numbers_makes_its_memory_as_it_goes() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    z, memory, seen = torch.randn(1, 2, 3, 2, 3), FrameMemory(), []
    wanted = vae.decode(z)
    vae.decoder.stages[0][0].register_forward_hook(lambda block, given, y: seen.append(y.mean().item()))
    assert torch.equal(torch.cat([vae.decode(part, memory) for part in z.split(1, 2)], 2), wanted)
    assert len(seen) == 3
    assert len(memory.tensors) == 32


@pytest.mark.parametrize("half", ["decoder", "encoder"])
@pytest.mark.parametrize("first", [True, False])
def test_streams_may_enter_and_leave_inference_mode(half: str, first: bool) -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    memory = FrameMemory()
    run, x, cuts = (vae.decode, torch.randn(1, 2, 2, 2, 3), [1, 1])
    if half == "encoder":
        run, x, cuts = (vae.encode, torch.rand(1, 3, 5, 16, 24), [1, 4])
    made = []
    for inside, part in zip((first, not first), x.split(cuts, 2), strict=True):
        with torch.inference_mode(inside):
            made.append(run(part, memory).clone())
    assert torch.equal(torch.cat(made, 2), run(x))


def test_an_interrupted_frame_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4, z_dim=2, latents_mean=(0, 0), latents_std=(1, 1)))
    z, memory = torch.randn(1, 2, 3, 2, 3), FrameMemory()
    vae.decode(z[:, :, :1], memory)
    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder.exit, "forward", lambda *given: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            vae.decode(z[:, :, 1:2], memory)
    with pytest.raises(RuntimeError, match=r"WanDecoder\.decode: a pass .* was interrupted; reset\(\)"):
        vae.decode(z[:, :, 1:2], memory)
    memory.reset()
    assert torch.equal(vae.decode(z, memory), vae.decode(z))


def test_wrong_settings_are_named() -> None:
    for changes, message in (
        ({"_class_name": "AutoencoderKL"}, "the VAE is 'AutoencoderKL', wanted 'AutoencoderKLWan'"),
        ({"is_residual": True}, "is_residual is True, wanted False as in Wan 2.1"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"spatial": 3}, "'spatial' is not known"),
        ({"temperal_downsample": [True]}, "wanted one entry for each pair"),
        ({"base_dim": 0}, "size below 1"),
        ({"z_dim": 3}, "have not 3 entries"),
        ({"latents_std": [0.0] * 16}, "wanted above 0"),
        ({"dim_mult": [1, 1, 1, 1], "base_dim": 7}, "7 channels, wanted an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            WanVaeConfig.from_config(changes)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_frames_are_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    decoder = WanVae(WanVaeConfig(base_dim=16), dtype=dtype).cuda().eval().decoder
    recorded, memory = RecordedDecoder(decoder), FrameMemory()
    for ready in (False, False, True, True):
        if ready:
            recorded.prepare(memory, batch=1, height=6, width=10)
        z = torch.randn(1, 16, 5, 6, 10, device="cuda", dtype=dtype)
        wanted = decoder.decode(z, FrameMemory())
        memory.reset()
        assert torch.equal(torch.cat([recorded.decode(part, memory) for part in z.split(2, 2)], 2), wanted)
