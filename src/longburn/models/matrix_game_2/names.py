"""The names of Matrix-Game 2's checkpoints, both ways."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from longburn.models.matrix_game_2.config import PATCH, MatrixGame2Config
from longburn.weights import Merge, Part, Rename, Rule, Skip, Split

PREFIX = "model."  # of every name in the released files


@dataclass(frozen=True)
class PatchColumns:
    """Of a convolution that does not overlap, `[out, channels, 1, 2, 2]`: the rows of a linear map over patches."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, 1, PATCH, PATCH)


def rules(config: MatrixGame2Config, *, prefix: str = PREFIX) -> tuple[Rule, ...]:
    """Names of the released `model.safetensors`, for a `MatrixGame2`."""
    return tuple(_rules(config, prefix))


def _rules(config: MatrixGame2Config, prefix: str) -> Iterable[Rule]:
    parts = (
        Part("noisy.weight", config.out_dim, PatchColumns()),
        Part("condition.weight", config.condition_channels, PatchColumns()),
    )
    yield Split(f"{prefix}patch_embedding.weight", parts, dim=1)
    yield Rename(f"{prefix}patch_embedding.bias", "condition.bias")
    for theirs, ours in (
        ("time_embedding.0", "time_in"),
        ("time_embedding.2", "time_out"),
        ("time_projection.1", "time_six"),
        ("img_emb.proj.0", "image.norm_in"),
        ("img_emb.proj.1", "image.fc1"),
        ("img_emb.proj.3", "image.fc2"),
        ("img_emb.proj.4", "image.norm_out"),
        ("head.head", "head"),
    ):
        yield from _both(prefix + theirs, ours)
    yield Rename(f"{prefix}head.modulation", "table")
    theirs, ours = f"{prefix}blocks.{{i}}.", "layers.{i}."
    yield Rename(f"{theirs}modulation", f"{ours}table")
    for part, own in (("self_attn", "attention"), ("cross_attn", "image")):
        together = ("q", "k", "v") if own == "attention" else ("k", "v")
        for kind in ("weight", "bias"):
            pieces = tuple(Part(f"{theirs}{part}.{piece}.{kind}", config.dim) for piece in together)
            yield Merge(pieces, f"{ours}{own}.{''.join(together)}.{kind}")
        if own == "image":
            yield from _both(f"{theirs}{part}.q", f"{ours}{own}.q")
        yield from _both(f"{theirs}{part}.o", f"{ours}{own}.out")
        for piece in ("q", "k"):
            yield Rename(f"{theirs}{part}.norm_{piece}.weight", f"{ours}{own}.{piece}_norm.weight")
    yield Rename(f"{theirs}norm3.weight", f"{ours}image_norm_weight")
    yield Rename(f"{theirs}norm3.bias", f"{ours}image_norm_bias")
    yield from _both(f"{theirs}ffn.0", f"{ours}up")
    yield from _both(f"{theirs}ffn.2", f"{ours}down")
    yield from _action(config, f"{theirs}action_model.", f"{ours}action.")


def _action(config: MatrixGame2Config, theirs: str, ours: str) -> Iterable[Rule]:
    for theirs_name, ours_name in (("keyboard_embed.0", "embed_in"), ("keyboard_embed.2", "embed_out")):
        yield from _both(theirs + theirs_name, f"{ours}keyboard.{ours_name}")
    for theirs_name, ours_name in (("keyboard_attn_kv", "kv"), ("mouse_attn_q", "q"), ("proj_keyboard", "out")):
        yield Rename(f"{theirs}{theirs_name}.weight", f"{ours}keyboard.{ours_name}.weight")
    action = config.action_config
    unused = ["key_attn_q_norm", "key_attn_k_norm"]
    if action.enable_mouse:
        unused += ["img_attn_q_norm", "img_attn_k_norm"]
        mouse = f"{ours}mouse."
        parts = (
            Part(f"{mouse}token.weight", config.dim),
            Part(f"{mouse}signal.weight", action.mouse_dim_in * action.window),
        )
        yield Split(f"{theirs}mouse_mlp.0.weight", parts, dim=1)
        yield Rename(f"{theirs}mouse_mlp.0.bias", f"{mouse}signal.bias")
        yield from _both(f"{theirs}mouse_mlp.2", f"{mouse}mix")
        yield Rename(f"{theirs}mouse_mlp.3.weight", f"{mouse}norm_weight")
        yield Rename(f"{theirs}mouse_mlp.3.bias", f"{mouse}norm_bias")
        yield Rename(f"{theirs}t_qkv.weight", f"{mouse}qkv.weight")
        yield Rename(f"{theirs}proj_mouse.weight", f"{mouse}out.weight")
    for name in unused:
        yield Skip(f"{theirs}{name}.weight", "the model divides by the norm alone and never applies this weight")


def _both(theirs: str, ours: str) -> Iterable[Rule]:
    for kind in ("weight", "bias"):
        yield Rename(f"{theirs}.{kind}", f"{ours}.{kind}")
