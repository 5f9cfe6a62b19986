"""What the parts of ACE-Step 1.5 share: bidirectional layers in the shape of Qwen3's, and stacks of them."""

import torch
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import Step
from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.nn import RMSNorm, SwiGLU


class EncoderLayer(nn.Module):
    """Attention to both sides and feed-forward, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: AceStep15Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        size, eps = config.encoder_hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, eps, dtype=dtype)
        self.attention = Attention(
            size,
            config.encoder_num_attention_heads,
            kv_heads=config.encoder_num_key_value_heads,
            head_dim=config.head_dim,
            window=config.window(layer),
            rope=config.rope,
            qk_norm=eps,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(size, eps, dtype=dtype)
        self.mlp = SwiGLU(size, config.encoder_intermediate_size, dtype=dtype)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention.forward(self.attention_norm.forward(x), step, residual=x)
        return self.mlp.forward(self.mlp_norm.forward(x), residual=x)


class Encoder(nn.Module):
    """An embedding of vectors, layers and a norm. Calling it takes what is already embedded.

    Args:
        size: of what is embedded.
        layers: how many; their windows are those of the first layers of the transformer.
    """

    def __init__(self, config: AceStep15Config, size: int, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Linear(size, config.encoder_hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(EncoderLayer(config, layer, dtype) for layer in range(layers))
        self.norm = RMSNorm(config.encoder_hidden_size, config.rms_norm_eps, dtype=dtype)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`, at the step's positions (-1: no token; what stands there is seen by nobody)."""
        for layer in self.layers:
            x = layer(x, step)
        return self.norm.forward(x)
