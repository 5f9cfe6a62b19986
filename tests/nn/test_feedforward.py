"""The shared blocks against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from longburn.nn import RMSNorm, SwiGLU


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(12,), (1, 1, 12), (2, 5, 12)])
def test_swiglu(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    block = SwiGLU(12, 20, bias=biased, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    weights = block.gate_up.weight.chunk(2)
    biases = block.gate_up.bias.chunk(2) if biased else (None, None)
    gate, up = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    wanted = F.linear(F.silu(gate) * up, block.down.weight, block.down.bias)
    for grad in (True, False):  # without gradients a row may go through other kernels
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(block(x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_one_row_equals_that_row_of_many(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = SwiGLU(64, 96, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        rows = torch.cat([block(row[None]) for row in x])
        torch.testing.assert_close(rows, block(x), atol=2 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 7, 24)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-3, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.2)
        x = torch.randn(shape, dtype=dtype)
        wanted = F.rms_norm(x.double(), (24,), norm.weight.double(), 1e-3)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(norm(x).double(), wanted, atol=4 * eps, rtol=4 * eps)


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for block in (SwiGLU(4, 5, bias=True, dtype=torch.float64), RMSNorm(4, dtype=torch.float64)):
        assert torch.autograd.gradcheck(block, (x,))
        block(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())


def test_made_on_the_device_and_in_the_type_asked_for() -> None:
    for block in (SwiGLU(4, 5, dtype=torch.bfloat16, device="meta"), RMSNorm(4, dtype=torch.bfloat16, device="meta")):
        assert all((p.dtype, p.device.type) == (torch.bfloat16, "meta") for p in block.parameters())
