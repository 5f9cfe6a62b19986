"""The default model's weights in the formats that other engines read, with the same values in the same dtype."""

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from longburn.models import load_model
from longburn.models.llama import LlamaConfig, hf_rules
from longburn.weights import GgufFile, save_checkpoint

GGUF_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write_safetensors(model: Path, dtype: str, directory: Path) -> Path:
    """A directory in Hugging Face layout for `AutoModelForCausalLM.from_pretrained`."""
    directory.mkdir(parents=True)
    llama = load_model(model, dtype=getattr(torch, dtype)).model
    save_checkpoint(llama, directory / "model.safetensors", hf_rules(llama.config))
    (directory / "config.json").write_text(json.dumps(_hf_config(llama.config, dtype)), encoding="utf-8")
    return directory


def _hf_config(config: LlamaConfig, dtype: str) -> dict[str, object]:
    if config.rope.scaling is not None:
        raise ValueError(f"write_safetensors: rope scaling {config.rope.scaling} is not written; wanted none")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def write_gguf(source: Path, dtype: str, path: Path) -> Path:
    """A GGUF file with the metadata of `source` and its tensors dequantised (vectors stay float32, as is usual)."""
    kind, file_type = GGUF_TYPES[dtype]
    fields = GGUFReader(source).fields
    writer = GGUFWriter(path, fields["general.architecture"].contents())
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(file_type)
    file = GgufFile(source)
    for name, info in file.tensors.items():
        values = file.read(name, torch.float32).numpy()
        stored = kind if len(info.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
