"""Loading into a model on the meta device and saving it back."""

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longburn.weights import (
    CheckpointError,
    CheckpointMismatch,
    GgufFile,
    InterleavedRows,
    Merge,
    Part,
    Rename,
    Skip,
    Split,
    Stack,
    StateDictSource,
    TensorInfo,
    Tied,
    load_checkpoint,
    open_source,
    save_checkpoint,
)

WIDTH, HEADS, LAYERS, EXPERTS = 12, 3, 2, 3


class Model(nn.Module):
    """One tensor for each kind of rule, in each of two layers."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {
                    "qkv": torch.randn(3 * WIDTH, WIDTH),
                    "gate": torch.randn(4, WIDTH),
                    "up": torch.randn(4, WIDTH),
                    "experts": torch.randn(EXPERTS, WIDTH, 2),
                    "norm": torch.randn(WIDTH),
                }
            )
            for _ in range(LAYERS)
        )
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.head = nn.Linear(WIDTH, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


RULES = (
    Rename("model.embed_tokens.weight", "embed.weight"),
    Rename("lm_head.weight", "head.weight"),
    Rename("model.{i}.norm.weight", "layers.{i}.norm"),
    Merge(
        (
            Part("model.{i}.q.weight", WIDTH, InterleavedRows(HEADS)),
            Part("model.{i}.k.weight", WIDTH, InterleavedRows(HEADS)),
            Part("model.{i}.v.weight", WIDTH),
        ),
        "layers.{i}.qkv",
    ),
    Split("model.{i}.gate_up.weight", (Part("layers.{i}.gate", 4), Part("layers.{i}.up", 4))),
    Stack("model.{i}.experts.{e}.weight", "layers.{i}.experts", EXPERTS),
    Rename("steps", "steps"),
    Skip("model.rotary.inv_freq", "computed from the configuration"),
)


def on_meta(tied: bool = False) -> Model:
    with torch.device("meta"):
        return Model(tied)


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint for `RULES`, with some tensors replaced or (None) taken out; `__` stands for a dot."""
    torch.manual_seed(0)
    out: dict[str, Tensor] = {
        "model.embed_tokens.weight": torch.randn(5, WIDTH),
        "lm_head.weight": torch.randn(5, WIDTH),
        "steps": torch.tensor([8, 9]),
        "model.rotary.inv_freq": torch.randn(3),
    }
    for i in range(LAYERS):
        out |= {f"model.{i}.{name}.weight": torch.randn(WIDTH, WIDTH) for name in "qkv"}
        out |= {f"model.{i}.experts.{e}.weight": torch.randn(WIDTH, 2) for e in range(EXPERTS)}
        out[f"model.{i}.gate_up.weight"] = torch.randn(8, WIDTH)
        out[f"model.{i}.norm.weight"] = torch.randn(WIDTH)
    replaced = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (out | replaced).items() if tensor is not None}


class Memory:
    """A source in memory that counts how many of the tensors it gave out are still alive."""

    def __init__(self, content: Mapping[str, Tensor]) -> None:
        self.content = content
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in content.items()}
        self.given: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def read(self, name: str) -> Tensor:
        tensor = self.content[name].clone()
        self.most_alive = max(self.most_alive, 1 + sum(ref() is not None for ref in self.given))
        self.given.append(weakref.ref(tensor))
        return tensor


def is_untouched(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_state_dict_is_a_source() -> None:
    state = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.arange(4)}
    source = StateDictSource(state)
    assert {name: (info.shape, info.dtype) for name, info in source.tensors.items()} == {
        "a": ((3, 2), torch.float64),
        "b": ((4,), torch.int64),
    }
    assert source.read("a") is state["a"]
    with pytest.raises(CheckpointError, match="no tensor 'c' in this state dict"):
        source.read("c")


def test_every_kind_of_rule_places_its_tensors() -> None:
    model, content = on_meta(), tensors()
    load_checkpoint(model, Memory(content), RULES)
    layer = model.layers[1]
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]  # two pairs in each head of 4
    assert torch.equal(layer["qkv"][:WIDTH], content["model.1.q.weight"][order])
    assert torch.equal(layer["qkv"][WIDTH : 2 * WIDTH], content["model.1.k.weight"][order])
    assert torch.equal(layer["qkv"][2 * WIDTH :], content["model.1.v.weight"])
    assert torch.equal(torch.cat([layer["gate"], layer["up"]]), content["model.1.gate_up.weight"])
    assert torch.equal(layer["experts"], torch.stack([content[f"model.1.experts.{e}.weight"] for e in range(EXPERTS)]))
    assert torch.equal(model.head.weight, content["lm_head.weight"])
    assert torch.equal(model.get_buffer("steps"), content["steps"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_saving_and_loading_are_inverse(tmp_path: Path) -> None:
    model = Model()
    save_checkpoint(model, tmp_path / "a.safetensors", RULES)
    again = on_meta()
    load_checkpoint(again, tmp_path / "a.safetensors", RULES)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    content = tensors(model__rotary__inv_freq=None)
    model = on_meta()
    load_checkpoint(model, Memory(content), RULES)
    save_checkpoint(model, tmp_path / "b.safetensors", RULES)
    saved = load_file(tmp_path / "b.safetensors")
    assert saved.keys() == content.keys()
    assert all(torch.equal(saved[name], content[name]) for name in content)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_one_error_lists_everything_with_both_shapes() -> None:
    content = tensors(
        model__0__norm__weight=None,
        model__1__q__weight=None,
        model__embed_tokens__weight=torch.zeros(7, WIDTH),
        model__0__k__weight=torch.zeros(4, WIDTH),
        model__1__gate_up__weight=torch.zeros(9, WIDTH),
        steps=torch.zeros(2),
        surplus=torch.zeros(1),
        model__2__norm__weight=torch.zeros(WIDTH),
    )
    model, source = on_meta(), Memory(content)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(model, source, RULES)
    assert sorted(caught.value.missing) == [
        "layers.0.norm [12]: wanted from model.0.norm.weight",
        "model.1.q.weight: needed for layers.1.qkv",
    ]
    assert sorted(caught.value.unused) == [
        "model.2.norm.weight [12]: the model has no layers.2.norm",
        "surplus [1]: no rule names it",
    ]
    assert sorted(caught.value.misshapen) == [
        "model.0.k.weight [4, 12] for layers.0.qkv[12:24] [36, 12]: [4, 12] is not 3 heads of rotary pairs",
        "model.1.gate_up.weight[0:4] [9, 12] for layers.1.gate [4, 12]: "
        "the parts make 8 in dimension 0, the whole is [9, 12]",
        "model.1.gate_up.weight[4:8] [9, 12] for layers.1.up [4, 12]: "
        "the parts make 8 in dimension 0, the whole is [9, 12]",
        "model.embed_tokens.weight [7, 12] for embed.weight [5, 12]: gives [7, 12], wanted [5, 12]",
        "steps [2] for steps [2]: gives [2], wanted [2]; is torch.float32, wanted torch.int64",
    ]
    for line in (*caught.value.missing, *caught.value.unused, *caught.value.misshapen):
        assert line in str(caught.value)
    assert isinstance(caught.value, CheckpointError)
    assert not source.given  # no data was read
    assert is_untouched(model)


def test_at_most_one_tensor_of_the_source_is_alive() -> None:
    source = Memory(tensors())
    load_checkpoint(on_meta(), source, RULES)
    assert len(source.given) == len(source.content) - 1  # each once; the skipped one not at all
    assert source.most_alive == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_of_floating_point_parameters_only(dtype: torch.dtype) -> None:
    content, model = tensors(), on_meta()
    load_checkpoint(model, Memory(content), RULES, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.get_buffer("steps").dtype == torch.int64
    assert torch.equal(model.embed.weight, content["model.embed_tokens.weight"].to(dtype))


def test_without_a_dtype_each_parameter_keeps_its_own() -> None:
    model = on_meta()
    model.head.to(torch.bfloat16)
    load_checkpoint(model, Memory(tensors()), RULES)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.embed.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (float("-inf"), torch.bfloat16),
        (70000.0, torch.float16),
        (float("nan"), torch.float8_e4m3fn),
    ],
)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype | None) -> None:
    bad = torch.zeros(WIDTH, WIDTH)
    bad[2, 3] = value
    model = on_meta()
    with pytest.raises(CheckpointError, match=r"model\.1\.v\.weight has 1 values that are not finite in torch\."):
        load_checkpoint(model, Memory(tensors(model__1__v__weight=bad)), RULES, dtype=dtype)
    assert is_untouched(model)
    load_checkpoint(model, Memory(tensors(model__1__v__weight=bad)), RULES, dtype=dtype, check_finite=False)
    assert not model.layers[1]["qkv"].float().isfinite().all()


def test_large_finite_values_pass_although_their_sum_is_infinite() -> None:
    large = torch.full((WIDTH, WIDTH), 3e38)
    load_checkpoint(on_meta(), Memory(tensors(model__0__v__weight=large)), RULES)


@pytest.mark.parametrize("present", [("model.embed_tokens.weight",), ("lm_head.weight",), None])
def test_a_shared_parameter_stays_shared_and_needs_one_name(present: tuple[str] | None) -> None:
    content = tensors()
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if present and name not in present:
            del content[name]
    model = on_meta(tied=True)
    load_checkpoint(model, Memory(content), RULES)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, content[present[0] if present else "lm_head.weight"])


def test_shared_parameters_must_agree_and_must_come_from_somewhere(tmp_path: Path) -> None:
    model = on_meta(tied=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed\.weight, to which the model ties"):
        load_checkpoint(model, Memory(tensors()), RULES)
    assert is_untouched(model)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(model, Memory(tensors(lm_head__weight=None, model__embed_tokens__weight=None)), RULES)
    assert len(caught.value.missing) == 2
    save_checkpoint(Model(tied=True), tmp_path / "tied.safetensors", RULES)
    assert "lm_head.weight" not in load_file(tmp_path / "tied.safetensors")


def test_tied_rule_checks_a_copy_that_the_model_does_not_have() -> None:
    rules, content = (Rename("embed", "weight"), Tied("head", "weight")), {"embed": torch.randn(5, 3)}
    for extra in ({}, {"head": content["embed"].clone()}):
        model = nn.Embedding(5, 3, device="meta")
        load_checkpoint(model, Memory(content | extra), rules, dtype=torch.bfloat16)
        assert torch.equal(model.weight, content["embed"].bfloat16())
    for other, message in ((content["embed"] + 1, "head differs"), (torch.zeros(4, 3), r"gives \[4, 3\]")):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(nn.Embedding(5, 3, device="meta"), Memory(content | {"head": other}), rules)


def test_progress_rises_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    model = on_meta()
    load_checkpoint(model, Memory(tensors()), RULES, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert len(seen) == len(tensors()) - 1


def test_buffers_that_no_checkpoint_holds_are_named() -> None:
    model = on_meta()
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match="no checkpoint holds table"):
        load_checkpoint(model, Memory(tensors()), RULES)


def test_a_source_that_fails_halfway_leaves_the_model_alone() -> None:
    class Failing(Memory):
        def read(self, name: str) -> Tensor:
            if name == "model.1.v.weight":
                raise CheckpointError("unreadable")
            return super().read(name)

    model = on_meta()
    with pytest.raises(CheckpointError, match="unreadable"):
        load_checkpoint(model, Failing(tensors()), RULES)
    assert is_untouched(model)


def one_file(content: dict[str, Tensor], directory: Path) -> Path:
    save_file(content, directory / "model.safetensors")
    return directory / "model.safetensors"


def loose_shards(content: dict[str, Tensor], directory: Path) -> Path:
    names = sorted(content)
    for i in range(3):
        save_file({name: content[name] for name in names[i::3]}, directory / f"part-{i}.safetensors")
    return directory


def indexed_shards(content: dict[str, Tensor], directory: Path) -> Path:
    loose_shards(content, directory)
    save_file({"stray": torch.zeros(1)}, directory / "not-in-the-index.safetensors")
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(content))}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("lay_out", [one_file, loose_shards, indexed_shards])
def test_safetensors_in_every_lay_out(lay_out: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    content, expected, model = tensors(), on_meta(), on_meta()
    load_checkpoint(model, lay_out(content, tmp_path), RULES)
    load_checkpoint(expected, Memory(content), RULES)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_open_source_goes_by_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        open_source(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_source(tmp_path / "none.safetensors")
    (tmp_path / "notes.txt").write_text("some notes")
    with pytest.raises(CheckpointError, match=r"notes.txt: not a GGUF file: begins with b'some', wanted b'GGUF'"):
        open_source(tmp_path / "notes.txt")


def test_real_model_loads_completely(smollm2_path: Path) -> None:
    """Two layers' worth of rules cover the names of all thirty; the values are those of the file."""
    heads, kv_heads, size, wide = 9, 3, 64, 1536
    width = heads * size
    source = GgufFile(smollm2_path)

    def layer() -> nn.ParameterDict:
        shapes = {"norm": (width,), "qkv": (width + 2 * kv_heads * size, width), "out": (width, width)}
        shapes |= {"mlp_norm": (width,), "gate_up": (2 * wide, width), "down": (width, wide)}
        return nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})

    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(49152, width), "norm": nn.RMSNorm(width)})
        model["layers"] = nn.ModuleList(layer() for _ in range(30))
    q = Part("blk.{i}.attn_q.weight", width, InterleavedRows(heads))
    k = Part("blk.{i}.attn_k.weight", kv_heads * size, InterleavedRows(kv_heads))
    rules = (
        Rename("token_embd.weight", "embed.weight"),
        Rename("output_norm.weight", "norm.weight"),
        Rename("blk.{i}.attn_norm.weight", "layers.{i}.norm"),
        Merge((q, k, Part("blk.{i}.attn_v.weight", kv_heads * size)), "layers.{i}.qkv"),
        Rename("blk.{i}.attn_output.weight", "layers.{i}.out"),
        Rename("blk.{i}.ffn_norm.weight", "layers.{i}.mlp_norm"),
        Merge((Part("blk.{i}.ffn_gate.weight", wide), Part("blk.{i}.ffn_up.weight", wide)), "layers.{i}.gate_up"),
        Rename("blk.{i}.ffn_down.weight", "layers.{i}.down"),
        Tied("output.weight", "embed.weight"),
    )
    load_checkpoint(model, source, rules, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    fused = model["layers"][29]["qkv"]  # type: ignore[index]
    assert torch.equal(fused[-192:], source.read("blk.29.attn_v.weight").bfloat16())
    pairs = source.read("blk.29.attn_k.weight").view(kv_heads, size // 2, 2, width).bfloat16()
    assert torch.equal(fused[width : width + 32], pairs[0, :, 0])
    assert torch.equal(fused[width + 32 : width + 64], pairs[0, :, 1])
