"""The velocities that an ACE-Step v1 run asks for, of one model under its prompts.

The released pipeline weakens the negative branch of guidance instead of emptying it (ERG): it multiplies queries of
some layers by 0.01, so that their attention is nearly even. There it does so by hooks; here the factors are arguments
of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longburn.attention import CrossKeyValues
from longburn.diffusion import Velocity
from longburn.models.ace_step.v1.sampling import Velocities
from longburn.models.ace_step.v1.transformer import AceStepV1

WEAK = 0.01
WEAK_LYRIC_LAYERS = (4, 5)
WEAK_BLOCKS = (15, 16, 17, 18, 19)


def velocities(
    model: AceStepV1,
    text: Tensor,
    lyric_ids: Tensor,
    *,
    weak_text: Tensor | None = None,
    speaker: Tensor | None = None,
    text_mask: Tensor | None = None,
    lyric_mask: Tensor | None = None,
    weak_lyric_layers: Sequence[int] | None = WEAK_LYRIC_LAYERS,
    weak_blocks: Sequence[int] = WEAK_BLOCKS,
    text_only: bool = False,
) -> Velocities:
    """Compute the keys and values of all branches once, for a whole run.

    Args:
        model: the transformer.
        text: the text encoder's states `[B, S, 768]`.
        lyric_ids: `[B, S']` int64; one masked id 0 where there are no lyrics.
        weak_text: the same, with the queries of the encoder's layers 8 and 9 times 0.01, for the negative branch. None
            is zeros. Only with weak lyrics; the released pipeline computes it without them too, and drops it.
        speaker: `[B, 512]`; None is zeros. The other branches always have zeros.
        text_mask, lyric_mask: bool, True where there is a token; for all branches.
        weak_lyric_layers: layers of the lyric encoder to weaken in the other branches. None gives the negative branch
            neither text nor lyrics (zeros, and id 0), and the text's branch no lyrics.
        weak_blocks: blocks to weaken in the negative branch; () for none. Their self-attention does not change by it,
            as linear attention divides the factor out again.
        text_only: make the branch for guidance by two conditions.

    Raises:
        ValueError: shapes that disagree.
    """

    def branch(text: Tensor, ids: Tensor, speaker: Tensor | None, layers: Sequence[int]) -> tuple[CrossKeyValues, ...]:
        weak = dict.fromkeys(layers, WEAK)
        return model.conditions(
            text, ids, speaker=speaker, text_mask=text_mask, lyric_mask=lyric_mask, lyric_query_scale=weak
        )

    def velocity(held: tuple[CrossKeyValues, ...], weak: Mapping[int, float]) -> Velocity:
        return lambda x, t: model.forward(x.to(text.dtype), t, held, query_scale=weak)

    emptied = weak_lyric_layers is None
    ids = torch.zeros_like(lyric_ids) if emptied else lyric_ids
    layers = weak_lyric_layers or ()
    negative = torch.zeros_like(text) if emptied or weak_text is None else weak_text
    cond = branch(text, lyric_ids, speaker, ())
    return Velocities(
        cond=velocity(cond, {}),
        uncond=velocity(branch(negative, ids, None, layers), dict.fromkeys(weak_blocks, WEAK)),
        text_only=velocity(branch(text, ids, None, layers), {}) if text_only else None,
    )
