"""The velocity of ACE-Step v1 (arXiv 2506.00045): linear attention over all frames, softmax attention to a condition.

B rows, F latent frames, S places of the condition, D model size. Frames see each other in both directions, and the
patch embedding's group norm takes its statistics over all of them: the model has no streaming form.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.attention import CrossKeyValues
from longburn.cache import Step
from longburn.kernels.linear import linear
from longburn.models.ace_step.v1.blocks import AceStepV1Block, FinalLayer, PatchEmbed, TimeEmbedding
from longburn.models.ace_step.v1.config import AceStepV1Config, LyricEncoderConfig
from longburn.models.ace_step.v1.lyrics import AS_TRAINED, LyricEncoder
from longburn.models.ace_step.v1.names import official_rules
from longburn.models.settings import read_settings
from longburn.weights import Progress, SafetensorsSource, load_checkpoint


class AceStepV1(nn.Module):
    """The transformer of ACE-Step v1, with its lyric encoder.

    >>> model = AceStepV1.from_checkpoint("ACE-Step-v1-3.5B/ace_step_transformer")
    >>> condition = model.conditions(text, lyric_ids)  # once
    >>> velocity = model(latents, t, condition)  # at every step of the sampler

    Args:
        config: sizes.
        dtype: of the parameters.
    """

    def __init__(self, config: AceStepV1Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        D, rope = config.inner_dim, config.rope
        self.patch = PatchEmbed(config, dtype)
        self.time = TimeEmbedding(D, dtype)
        self.modulation = nn.Linear(D, 6 * D, dtype=dtype)
        self.blocks = nn.ModuleList(AceStepV1Block(config, rope, dtype) for _ in range(config.num_layers))
        self.final = FinalLayer(config, dtype)
        self.speaker = nn.Linear(config.speaker_embedding_dim, D, dtype=dtype)
        self.text = nn.Linear(config.text_embedding_dim, D, dtype=dtype)
        words = torch.empty(config.lyric_encoder_vocab_size, config.lyric_hidden_size, dtype=dtype)
        self.lyric_embed: nn.Embedding = nn.Embedding.from_pretrained(words, freeze=False)  # type: ignore[no-untyped-call]
        if not words.is_meta:  # there PyTorch would load its compiler to draw nothing
            nn.init.normal_(self.lyric_embed.weight)
        self.lyric_encoder = LyricEncoder(config.lyric_encoder, dtype=dtype)
        self.lyrics = nn.Linear(config.lyric_encoder.output_size, D, dtype=dtype)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        lyric_encoder: LyricEncoderConfig | None = None,
        progress: Progress | None = None,
    ) -> "AceStepV1":
        """Load the released `ace_step_transformer`, a directory of `config.json` and safetensors.

        Args:
            dtype, device: of the parameters.
            lyric_encoder: its sizes, which the `config.json` does not state; default the released ones.
            progress: called with (elements placed, elements in all) after each tensor.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: a configuration that is not ACE-Step v1's.
        """
        config = AceStepV1Config.from_config(read_settings(Path(path)), lyric_encoder=lyric_encoder)
        with torch.device("meta"):
            model = cls(config, dtype=dtype)
        load_checkpoint(model, SafetensorsSource(path), official_rules(config), device=device, progress=progress)
        return model.eval()

    def condition(
        self,
        text: Tensor,
        lyric_ids: Tensor,
        *,
        speaker: Tensor | None = None,
        text_mask: Tensor | None = None,
        lyric_mask: Tensor | None = None,
        lyric_query_scale: Mapping[int, float] = AS_TRAINED,
    ) -> tuple[Tensor, Tensor | None]:
        """What the frames attend to: the speaker, the text and the lyrics, `[B, 1 + S_text + S_lyrics, D]`.

        Args:
            text: states of the text encoder `[B, S_text, text_embedding_dim]`.
            lyric_ids: `[B, S_lyrics]` int64.
            speaker: `[B, speaker_embedding_dim]`; None is all zeros, as in the released pipeline.
            text_mask, lyric_mask: bool, True where there is a token (default: everywhere). Lyrics go on from the first
                column; ids that are masked may be anything.
            lyric_query_scale: factors of the queries of some of the lyric encoder's layers, by index.

        Returns:
            The condition, and its mask `[B, 1 + S_text + S_lyrics]`, None where there is a token everywhere.

        Raises:
            ValueError: shapes or types that disagree, or (on the CPU) an id outside the vocabulary.
        """
        B = text.shape[0]
        if text.dim() != 3 or text.shape[2] != self.text.in_features or lyric_ids.dim() != 2 or len(lyric_ids) != B:
            raise ValueError(
                f"AceStepV1.condition: text is {tuple(text.shape)} and lyric_ids {tuple(lyric_ids.shape)}, "
                f"wanted [B, S, {self.text.in_features}] and [B, S]"
            )
        if speaker is None:
            speaker = text.new_zeros(B, self.speaker.in_features)
        if speaker.shape != (B, self.speaker.in_features):
            raise ValueError(
                f"AceStepV1.condition: speaker is {tuple(speaker.shape)}, wanted ({B}, {self.speaker.in_features})"
            )
        _check_mask("AceStepV1.condition", "text_mask", text_mask, text.shape[:2])
        _check_mask("AceStepV1.condition", "lyric_mask", lyric_mask, lyric_ids.shape)
        ids, V = lyric_ids, self.lyric_embed.num_embeddings
        if lyric_mask is not None:
            ids = ids.masked_fill(~lyric_mask, 0)
        if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(
                f"AceStepV1.condition: lyric_ids run from {int(ids.min())} to {int(ids.max())}, wanted 0 to {V - 1}"
            )
        lyrics = self.lyric_encoder.forward(self.lyric_embed(ids), lyric_mask, query_scale=lyric_query_scale)
        parts = (
            linear(speaker[:, None], self.speaker.weight, self.speaker.bias),
            linear(text, self.text.weight, self.text.bias),
            linear(lyrics, self.lyrics.weight, self.lyrics.bias),
        )
        if text_mask is None and lyric_mask is None:
            return torch.cat(parts, 1), None
        masks = (None, text_mask, lyric_mask)
        held = [
            p.new_ones(p.shape[:2], dtype=torch.bool) if m is None else m for p, m in zip(parts, masks, strict=True)
        ]
        return torch.cat(parts, 1), torch.cat(held, 1)

    def keys_values(self, condition: Tensor, mask: Tensor | None = None) -> tuple[CrossKeyValues, ...]:
        """Every block's keys and values of a condition `[B, S, D]`: they hold for all steps and noise levels."""
        return tuple(block.cross.keys_values(condition, mask) for block in self.blocks)  # type: ignore[union-attr, operator]

    def conditions(
        self,
        text: Tensor,
        lyric_ids: Tensor,
        *,
        speaker: Tensor | None = None,
        text_mask: Tensor | None = None,
        lyric_mask: Tensor | None = None,
        lyric_query_scale: Mapping[int, float] = AS_TRAINED,
    ) -> tuple[CrossKeyValues, ...]:
        """`keys_values` of `condition`, with its arguments."""
        return self.keys_values(
            *self.condition(
                text,
                lyric_ids,
                speaker=speaker,
                text_mask=text_mask,
                lyric_mask=lyric_mask,
                lyric_query_scale=lyric_query_scale,
            )
        )

    def forward(
        self,
        latents: Tensor,
        t: Tensor | float,
        conditions: Sequence[CrossKeyValues],
        frame_mask: Tensor | None = None,
        *,
        query_scale: Mapping[int, float] = AS_TRAINED,
    ) -> Tensor:
        """The velocity (noise minus music) at noise level t, of the latents' shape.

        Args:
            latents: `[B, 8, 16, F]`, any F.
            t: the noise level, from 0 (music) to 1 (noise): a number, or one a row `[B]`.
            conditions: what `conditions` gave.
            frame_mask: bool `[B, F]`, True where there is a frame (default: everywhere). Frames beyond are not attended
                to and attend to nothing, but still are neighbours of the last ones in the convolutions, and enter the
                statistics of the first norm: a padded row is not what it is alone.
            query_scale: factors of the queries of some blocks' cross attention, by the block's index. In the linear
                self-attention such a factor cancels.

        Raises:
            ValueError: shapes or types that disagree, or conditions of another number of blocks.
        """
        config = self.config
        B, F_ = latents.shape[0], latents.shape[-1]
        if latents.shape != (B, config.in_channels, config.max_height, F_) or F_ < 1:
            raise ValueError(
                f"AceStepV1: latents are {tuple(latents.shape)}, "
                f"wanted [B, {config.in_channels}, {config.max_height}, frames] with at least one frame"
            )
        if len(conditions) != len(self.blocks) or conditions[0].k.shape[0] != B:
            came = f"{len(conditions)} blocks" + (f" and {conditions[0].k.shape[0]} rows" if conditions else "")
            raise ValueError(
                f"AceStepV1: conditions are for {came}, wanted {len(self.blocks)} blocks and {B} rows; "
                "take them from conditions() of this model"
            )
        level = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float32, device=latents.device)
        if level.shape not in ((), (1,), (B,)):
            raise ValueError(f"AceStepV1: t is of shape {tuple(level.shape)}, wanted a number or one a row, ({B},)")
        _check_mask("AceStepV1", "frame_mask", frame_mask, (B, F_))
        step = Step.from_zero(F_, latents.device)
        if frame_mask is not None:
            step = Step.of(torch.where(frame_mask, step.positions, -1), read=False)
        time = self.time.forward(level.reshape(-1))
        shared = linear(F.silu(time), self.modulation.weight, self.modulation.bias).view(-1, 6, config.inner_dim)
        x = self.patch.forward(latents)
        for index, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            x = block(x, shared, condition, step, query_scale.get(index, 1.0))
        return self.final.forward(x, time)


def _check_mask(owner: str, name: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    if mask is not None and (mask.shape != tuple(shape) or mask.dtype != torch.bool):
        raise ValueError(f"{owner}: {name} is {mask.dtype} {tuple(mask.shape)}, wanted bool {tuple(shape)}")
