"""The GPT-OSS decoder (OpenAI, arXiv 2508.10925): windows in every other layer, learned sinks, a mixture of experts."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import RollingKVCache, Step, WindowPolicy
from longburn.models.decoder import Decoder
from longburn.models.gpt_oss.config import GptOssConfig
from longburn.models.gpt_oss.names import HF_EXPERTS, ORIGINAL_EXPERTS, hf_rules, is_original, original_rules
from longburn.models.settings import read_settings
from longburn.nn import ExpertStorage, MoE, Mxfp4Weight, RMSNorm
from longburn.weights import CheckpointError, SafetensorsSource, TensorSource, load_checkpoint


class GptOssBlock(nn.Module):
    """One layer: attention and a mixture of experts, each behind an RMSNorm and added to the stream."""

    def __init__(
        self, config: GptOssConfig, layer: int, policy: WindowPolicy, experts: ExpertStorage, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, round_last=True, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=policy.of_layer(layer),
            rope=config.rope,
            sinks=True,
            qkv_bias=True,
            out_bias=True,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, round_last=True, dtype=dtype)
        self.mlp = MoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.experts_per_token,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
            storage=experts,
            dtype=dtype,
        )

    def forward(self, x: Tensor, step: Step, cache: RollingKVCache | None) -> Tensor:
        x = self.attention.forward(self.attention_norm.forward(x), step, cache=cache, residual=x)
        return self.mlp.forward(self.mlp_norm.forward(x), residual=x)


class GptOss(Decoder):
    """A GPT-OSS model; implements `AutoregressiveModel`.

    Args:
        config: sizes.
        policy: the window of every layer; default `config.policy()`, as it was trained. `config.policy(window)` gives
            the layers that see all keys a window too, with kept sink tokens if wanted.
        experts: "dense" (can be trained) or "mxfp4" (4.25 bits a value, read as they are).
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: GptOssConfig,
        *,
        policy: WindowPolicy | None = None,
        experts: ExpertStorage = "dense",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        policy = policy or config.policy()
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            (GptOssBlock(config, layer, policy, experts, dtype) for layer in range(config.num_hidden_layers)),
            RMSNorm(config.hidden_size, config.rms_norm_eps, round_last=True, dtype=dtype),
            dtype=dtype,
        )
        self.config = config

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        experts: ExpertStorage | None = None,
        policy: WindowPolicy | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "GptOss":
        """Load a directory with a `config.json` and safetensors, in OpenAI's original format or Hugging Face's.

        One tensor is read at a time, so the host holds at most the largest one beside what is placed.

        Args:
            dtype: of the weights that are not MXFP4, and of the cache.
            device: where they go.
            experts: "mxfp4" or "dense"; default as they are stored. Unpacking MXFP4 is exact, packing rounds.
            policy: the window of every layer; see the class.
            progress: called with (elements placed, elements in all) after each tensor.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: a configuration that is not GPT-OSS's.
        """
        config = GptOssConfig.from_config(read_settings(Path(path)))
        source = SafetensorsSource(path)
        original = is_original(source)
        names = ORIGINAL_EXPERTS if original else HF_EXPERTS
        storage = experts or ("mxfp4" if names.are_packed(source) else "dense")
        view: TensorSource = names.packed(source) if storage == "mxfp4" else names.dense(source)
        with torch.device("meta"):
            model = cls(config, policy=policy, experts=storage, dtype=dtype)
        rules = original_rules(config, storage) if original else hf_rules(config, storage)
        load_checkpoint(model, view, rules, device=device, progress=progress)
        _check_scales(model)
        return model.eval()


def _check_scales(model: nn.Module) -> None:
    """Refuse the scale byte that means NaN."""
    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, Mxfp4Weight))
    if bad := [name for name, weight in packed if (weight.scales == 255).any()]:
        raise CheckpointError(f"{len(bad)} tensors hold MXFP4 scales that stand for NaN (byte 255): {', '.join(bad)}")
