"""Loads a checkpoint into a model on the meta device, tensor by tensor, and saves one back.

All names and shapes are compared before any data is read; a model is filled completely or left as it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longburn.weights.gguf import GgufFile
from longburn.weights.match import match, match_to_save
from longburn.weights.rules import AsIs, Link, Range, Rule
from longburn.weights.sources import (
    CheckpointError,
    PlacingSource,
    Progress,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
)


class CheckpointMismatch(CheckpointError):  # noqa: N818 (it names what is found, like KeyError's family)
    """Names or shapes of a checkpoint differ from the model's, or tensors are cut off.

    Attributes:
        missing, unused, misshapen, damaged: one line for each tensor concerned, which begins with its name.
    """

    def __init__(
        self, missing: Sequence[str], unused: Sequence[str], misshapen: Sequence[str], damaged: Sequence[str] = ()
    ) -> None:
        self.missing, self.unused, self.misshapen = tuple(missing), tuple(unused), tuple(misshapen)
        self.damaged = tuple(damaged)
        kinds = {
            "missing": self.missing,
            "unused": self.unused,
            "mis-shaped": self.misshapen,
            "damaged": self.damaged,
        }
        lines = [f"  {kind}: {line}" for kind, group in kinds.items() for line in group]
        counts = ", ".join(f"{len(group)} {kind}" for kind, group in kinds.items() if group)
        super().__init__("\n".join([f"the checkpoint does not fit the model: {counts}", *lines]))


def open_source(path: str | Path) -> TensorSource:
    """Opens a checkpoint by what it is: a directory or a file of safetensors, or a GGUF file.

    Raises:
        CheckpointError: nothing there, or neither of the two formats.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return SafetensorsSource(path)
    return GgufFile(path)


def load_checkpoint(
    model: nn.Module,
    source: TensorSource | str | Path,
    rules: Sequence[Rule],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    progress: Progress | None = None,
) -> None:
    """Fills `model`, which is best built under `torch.device("meta")`, from a checkpoint.

    One tensor is read at a time, and one that stays as it is goes straight to its place. So beyond what is placed the
    host holds at most the largest tensor of the checkpoint; of those that stay as they are and go to a GPU, 128 MiB. A
    parameter that the model has under several names stays shared: the checkpoint may hold it under one of them, or
    under more with equal values.

    Args:
        source: a path for `open_source`, or an open source.
        rules: how the checkpoint's names lead to the model's.
        dtype: of all floating-point parameters; None keeps the dtype that each has in the model.
        device: where the parameters go.
        check_finite: refuse NaN and infinite values (after the conversion to `dtype`, whose range may be too small).
        progress: called with (elements placed, elements in all) after each tensor that is read.

    Raises:
        CheckpointMismatch: lists every missing, unused, mis-shaped (with both shapes) and damaged tensor.
        CheckpointError: an unreadable checkpoint, values that are not finite, tied tensors that differ, or buffers on
            the meta device that no checkpoint holds. The model is unchanged after any error.
    """
    if isinstance(source, str | Path):
        source = open_source(source)
    ours: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if stuck := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in ours]:
        raise CheckpointError(
            f"no checkpoint holds {', '.join(stuck)}: build non-persistent buffers off the meta device"
        )
    links, ties = plan(source.tensors, ours, rules)
    placed: dict[str, Tensor] = {}
    bad: list[str] = []
    total, done = sum(math.prod(_cut(ours[link.ours], link.our_range).shape) for link in links), 0
    groups = _by_source(links)
    # Largest first: the copy that is read is then gone before most of the model stands beside it.
    for name in sorted(groups, key=lambda name: -math.prod(source.tensors[name].shape)):
        group = groups[name]
        for link in group:
            if link.ours not in placed:
                placed[link.ours] = _empty_like(ours[link.ours], dtype, device)
        targets = [_cut(placed[link.ours], link.our_range) for link in group]
        _place(source, name, group, targets)
        done += sum(target.numel() for target in targets)
        if check_finite and (count := sum(_count_nonfinite(target) for target in targets)):
            bad.append(f"{name} has {count} values that are not finite in {targets[0].dtype}")
        if progress is not None:
            progress(done, total)
    for link in ties:
        target = _cut(placed[link.ours], link.our_range)
        if not torch.equal(link.layout.to_ours(_cut(source.read(link.theirs), link.their_range)).to(target), target):
            bad.append(f"{link.theirs} differs from {link.ours}, to which the model ties it")
    if bad:
        raise CheckpointError(f"{len(bad)} tensors cannot be used: {'; '.join(bad)}")
    _assign(model, ours, placed)


def save_checkpoint(model: nn.Module, path: str | Path, rules: Sequence[Rule]) -> None:
    """Writes the parameters and persistent buffers of `model` to one safetensors file, under the checkpoint's names.

    The inverse of `load_checkpoint` with the same rules. The file appears when it is complete. A parameter that the
    model has under several names is written once.

    Raises:
        ValueError: a tensor that the rules cannot name.
    """
    path = Path(path)
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first = _first_names(state)
    state = {name: tensor.detach() for name, tensor in state.items() if first[name] == name}
    pieces = _by_source(match_to_save(rules, state))
    out: dict[str, Tensor] = {}
    for name, links in pieces.items():
        parts = [link.layout.to_theirs(_cut(state[link.ours], link.our_range)) for link in links]
        their_range = links[0].their_range
        out[name] = parts[0].contiguous() if their_range is None else torch.cat(parts, their_range.dim)
    unfinished = path.with_name(path.name + ".part")
    save_file(out, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)


def plan(
    theirs: Mapping[str, TensorInfo], ours: Mapping[str, Tensor], rules: Sequence[Rule]
) -> tuple[list[Link], list[Link]]:
    """What to copy and what to compare, with the names of ours replaced by the first of those that share a parameter.

    Raises:
        CheckpointMismatch: what `match` or the shapes find.
    """
    found = match(rules, theirs, ours)
    first = _first_names(ours)
    filler = {first[link.ours]: link.ours for link in reversed(found.links)}
    fills = [filler[first[link.ours]] == link.ours for link in found.links]
    links = [replace(link, ours=first[link.ours]) for link, fill in zip(found.links, fills, strict=True) if fill]
    ties = [link for link, fill in zip(found.links, fills, strict=True) if not fill] + list(found.ties)
    ties = [replace(link, ours=first[link.ours]) for link in ties]
    missing = [
        f"{name} {list(ours[name].shape)}: {why}" if name in ours else f"{name}: {why}"
        for name, why in found.missing.items()
        if first.get(name) not in filler
    ]
    unused = [f"{name} {list(theirs[name].shape)}: {why}" for name, why in found.unused.items()]
    misshapen = [line for link in links + ties if (line := _misfit(link, theirs[link.theirs], ours[link.ours]))]
    damaged = [f"{name} {list(info.shape)}: {info.damage}" for name, info in theirs.items() if info.damage]
    if missing or unused or misshapen or damaged:
        raise CheckpointMismatch(missing, unused, misshapen, damaged)
    return links, ties


def _misfit(link: Link, theirs: TensorInfo, ours: Tensor) -> str | None:
    """What is wrong with the shapes or dtypes of a link, if anything; tried out on tensors without data."""
    try:
        came = _cut(torch.empty(theirs.shape, dtype=theirs.dtype, device="meta"), link.their_range)
        came = link.layout.to_ours(came)
        wanted = _cut(torch.empty(ours.shape, dtype=ours.dtype, device="meta"), link.our_range)
    except (ValueError, RuntimeError, IndexError) as error:
        problem = str(error)
    else:
        castable = came.dtype == wanted.dtype or (came.is_floating_point() and wanted.is_floating_point())
        if came.shape == wanted.shape and castable:
            return None
        problem = f"gives {list(came.shape)}, wanted {list(wanted.shape)}"
        if not castable:
            problem += f"; is {came.dtype}, wanted {wanted.dtype}"
    ends = [f"{link.theirs}{link.their_range or ''} {list(theirs.shape)}", f"{link.ours}{link.our_range or ''}"]
    return f"{ends[0]} for {ends[1]} {list(ours.shape)}: {problem}"


def _place(source: TensorSource, name: str, links: Sequence[Link], targets: Sequence[Tensor]) -> None:
    """Read a tensor of the checkpoint to where it belongs: at once if it stays as it is, else by way of a copy."""
    if isinstance(source, PlacingSource) and len(links) == 1 and _stays(links[0], source.tensors[name], targets[0]):
        source.read_into(name, targets[0])
        return
    tensor = source.read(name)
    for link, target in zip(links, targets, strict=True):
        target.copy_(link.layout.to_ours(_cut(tensor, link.their_range)))


def _stays(link: Link, theirs: TensorInfo, target: Tensor) -> bool:
    """Whether the whole tensor of theirs becomes this one byte for byte."""
    whole = link.their_range is None and link.layout == AsIs()
    return whole and theirs.dtype == target.dtype and target.is_contiguous()


def _cut(tensor: Tensor, part: Range | None) -> Tensor:
    return tensor if part is None else part.of(tensor)


def _by_source(links: Iterable[Link]) -> dict[str, list[Link]]:
    grouped: dict[str, list[Link]] = {}
    for link in links:
        grouped.setdefault(link.theirs, []).append(link)
    return grouped


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the first of the names under which the same parameter is known."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in state.items()}


def _empty_like(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    own = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    return torch.empty(tensor.shape, dtype=own, device=device)


def _count_nonfinite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    tensor = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    # NaN and infinity show at the ends, so finite ones clear the tensor in a single pass without a copy or a mask.
    if tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax()):
        return 0
    return int(tensor.isfinite().logical_not().sum())


def _assign(model: nn.Module, ours: Mapping[str, Tensor], placed: Mapping[str, Tensor]) -> None:
    first = _first_names(ours)
    made = {
        name: nn.Parameter(tensor, requires_grad=ours[name].requires_grad)
        if isinstance(ours[name], nn.Parameter)
        else tensor
        for name, tensor in placed.items()
    }
    model.load_state_dict({name: made[first[name]] for name in ours}, assign=True)
