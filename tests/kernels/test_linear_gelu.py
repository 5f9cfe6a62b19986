"""The product with a GELU, against its formula in fp64."""

import math

import pytest
import torch
from torch import Tensor

from longburn import use_impl
from longburn.kernels.gelu import linear_gelu


def gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x.double() @ weight.double().T + bias.double()
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def test_linear_gelu_is_its_formula() -> None:
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(linear_gelu(x, weight, bias).double(), gelu(x, weight, bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="linear_gelu: x"):
        linear_gelu(x, weight[:, :20], bias)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_gelu_of_the_library_on_a_gpu(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s, device="cuda").to(dtype) / 4 for s in ((300, 64), (128, 64), (128,)))
    wanted = gelu(x, weight, bias)
    with use_impl("cublas"):
        y = linear_gelu(x, weight, bias)
    assert float((y.double() - wanted).norm() / wanted.norm()) < {torch.float32: 1e-3}.get(dtype, 4e-3)
