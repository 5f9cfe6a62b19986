"""Frames for a causal convolution: the kernel and the reference against the formula written out."""

import pytest
import torch
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.frames import ADD, OPERATION, AddCall, FramesCall, add_frames, norm_frames
from longburn.kernels.registry import use_impl


def by_hand(x: Tensor, weight: Tensor, past: Tensor, bias: Tensor | None) -> Tensor:
    """In fp64, pixel by pixel: divided by its length, times the root of the number of channels."""
    wide = x.double() + (0 if bias is None else bias.double())
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    normed = wide / length * wide.shape[-1] ** 0.5 * weight.double()
    frames = torch.cat([past.double(), normed / (1 + (-normed).exp())], 1)
    windows = [frames[:, t : t + 3].permute(0, 2, 3, 1, 4).flatten(3) for t in range(x.shape[1])]
    return torch.stack(windows, 1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("channels", "with_bias"), [(3, False), (24, True), (96, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frames_are_normed_and_remembered(
    impl: str, frames: int, channels: int, with_bias: bool, dtype: torch.dtype
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert device == "cuda" or triton.interprets()  # conftest.py sees to it: nothing is skipped
    torch.manual_seed(0)
    x = torch.randn(2, frames, 5, 23, channels).to(device, dtype)
    x[0, 0, 0, 0] = 0  # a pixel without length
    weight, past = torch.randn(channels).to(device, dtype), torch.randn(2, 2, 5, 23, channels).to(device, dtype)
    bias = torch.randn(channels).to(device, dtype) if with_bias else None
    wanted = by_hand(x, weight, past, bias)
    with use_impl(impl):
        y = norm_frames(x, weight, past, bias=bias)
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(past, torch.stack(y[:, -1].chunk(3, -1)[1:], 1)), "the last two frames are remembered"
    assert bool(y.isfinite().all())


def test_what_does_not_belong_together_is_refused() -> None:
    x, weight, past = torch.zeros(1, 2, 3, 4, 5), torch.ones(5), torch.ones(1, 2, 3, 4, 5)
    for wrong in (
        (x, torch.ones(4), past),
        (x, weight, past[:, :1]),
        (x, weight, past[..., :4]),
        (x[:, :0], weight, past),
        (x, weight, past, torch.ones(1)),
        (x, weight, past, torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"norm_frames: .* wanted \[B, T, H, W, C\]"):
            norm_frames(*wrong[:3], bias=wrong[3] if len(wrong) > 3 else None)
    assert bool((past == 1).all())


def test_why_the_kernel_does_not_take_a_call() -> None:
    call = FramesCall(torch.zeros(1, 1, 2, 2, 4), torch.ones(4), torch.zeros(1, 2, 2, 2, 4), None)
    (kernel,) = (impl for impl in OPERATION.impls if impl.name == "triton")
    assert "CUDA" in str(kernel.why_not(call))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = FramesCall(*(None if part is None else part.to(device) for part in call))
    with use_impl("triton"):
        assert kernel.why_not(call) is None
        assert "takes fp32, bf16 or fp16, one type" in str(kernel.why_not(call._replace(past=call.past.half())))
        assert kernel.why_not(call._replace(x=call.x.mT.contiguous().mT)) == "a tensor has gaps"


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frames_are_added_in_place(impl: str, dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert device == "cuda" or triton.interprets()  # conftest.py sees to it: nothing is skipped
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 3, 7, 65, 40, device=device).to(dtype)
    bias = torch.randn(40, device=device).to(dtype)
    wanted = x.double() + y.double() + bias.double()
    with use_impl(impl):
        total = add_frames(x, y, bias)
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(total.double(), wanted, atol=tolerance, rtol=0)
    assert total.data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match=r"add_frames: .* wanted one shape"):
        add_frames(x, y[:1], bias)
    (kernel,) = (impl for impl in ADD.impls if impl.name == "triton")
    with use_impl("triton"):
        assert "one type for all" in str(kernel.why_not(AddCall(x, y.double(), bias)))
        assert kernel.why_not(AddCall(x, y.transpose(1, 2), bias)) == "a tensor has gaps"
