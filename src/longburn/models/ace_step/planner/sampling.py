"""Drawing tokens of guided pairs: which steps act on the logits, and in which order.

The released backends do the same things in different orders, and so draw from different distributions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from longburn.sampling import Sampled, Sampler, SamplerConfig, TokenCounts
from longburn.sampling.processors import clean, keep_top_p, most_likely, penalise_repetition, weigh

Stage = Literal["guidance", "rules", "repetition", "temperature", "top_k", "top_p"]
Rules = Callable[[Tensor, Tensor], Tensor]
"""From scores `[N, V]` and the positions `[N]` of the tokens to draw, to scores with -inf where there is no choice."""

ORDERS: Mapping[str, tuple[Stage, ...]] = {
    "pytorch": ("guidance", "rules", "repetition", "top_k", "top_p", "temperature"),
    # It would penalise before guidance, but its test for "all penalties are 1" is inverted: none is ever applied.
    "nano-vllm": ("guidance", "rules", "temperature", "top_k", "top_p"),
    "comfyui": ("guidance", "rules", "top_k", "top_p", "temperature"),
}


@dataclass(frozen=True)
class PlannerSampling:
    """How tokens are drawn; the defaults are those of the released pipeline.

    Args:
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
        repetition_penalty: of tokens in the prompt with the caption, and of those that were made; 1 is off.
        guidance: g of `u + g (c - u)`, c being the logits after the prompt and u those after the one without what is
            asked for; 1 is off and halves the work.
        order: a name of `ORDERS`, or stages; "temperature" may be followed by "top_k" and "top_p", in this order.
        seed: of the first song; the next ones take the numbers after it. None takes a fresh one.

    Raises:
        ValueError: a setting out of range, an order that is not known, or a penalty in an order that has none.
    """

    temperature: float = 0.85
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    guidance: float = 2.0
    order: str | tuple[Stage, ...] = "pytorch"
    seed: int | None = None

    def __post_init__(self) -> None:
        self._config(self.seed, self.stages)
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"PlannerSampling: guidance {self.guidance}, wanted a finite number of at least 1 (off)")
        if self.repetition_penalty != 1 and "repetition" not in self.stages:
            raise ValueError(
                f"PlannerSampling: repetition_penalty {self.repetition_penalty}, but order {self.order!r} never "
                "applies one; set it to 1, or take the order 'pytorch'"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the order stands for."""
        order = ORDERS.get(self.order) if isinstance(self.order, str) else tuple(self.order)
        if order is None:
            raise ValueError(f"PlannerSampling: order {self.order!r}, wanted {', '.join(map(repr, ORDERS))} or stages")
        last = order[order.index("temperature") :] if "temperature" in order else ()
        twice, needed = len(set(order)) < len(order), {"guidance", "rules", "temperature"}
        if twice or not needed <= set(order) <= set(get_args(Stage)) or last not in _LAST:
            raise ValueError(
                f"PlannerSampling: order {order}, wanted each of {', '.join(get_args(Stage))} at most once, with "
                "guidance and rules, and after temperature nothing but top_k and top_p, in this order"
            )
        return order

    @property
    def guided(self) -> bool:
        """Whether every song needs a pair of rows."""
        return self.guidance != 1

    def configs(self, songs: int) -> list[SamplerConfig]:
        """What is left to the library's sampler for each song."""
        first = self._config(self.seed, self.stages).resolved().seed
        assert first is not None
        _, drawing = self.split()
        return [self._config((first + song) % 2**64, drawing) for song in range(songs)]

    def split(self) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """The stages that come before the library's sampler, and its own: temperature and all after it, or all cuts
        before it.
        """
        stages = self.stages
        if stages[-1] != "temperature":
            first = stages.index("temperature")
        else:
            cuts = [n for n in range(len(stages)) if stages[n:] in _CUTS]
            first = min(cuts, default=len(stages) - 1)
        return stages[:first], stages[first:]

    def _config(self, seed: int | None, stages: tuple[Stage, ...]) -> SamplerConfig:
        return SamplerConfig(
            temperature=self.temperature,
            top_k=self.top_k if "top_k" in stages else 0,
            top_p=self.top_p if "top_p" in stages else 1.0,
            temperature_last="temperature" in stages[1:],
            repetition_penalty=self.repetition_penalty if "repetition" in stages else 1.0,
            seed=seed,
        )


_LAST: tuple[tuple[str, ...], ...] = (
    ("temperature",),
    ("temperature", "top_k"),
    ("temperature", "top_p"),
    ("temperature", "top_k", "top_p"),
)
_CUTS: tuple[tuple[str, ...], ...] = (
    ("top_k", "temperature"),
    ("top_p", "temperature"),
    ("top_k", "top_p", "temperature"),
)


class GuidedSampler(Sampler):
    """One token for each song, handed to both rows of its pair. Nothing is read back to the host by itself.

    Rows are the songs and then, with guidance, their counterparts in the same order. The draw of a token depends on
    its song's seed and on its position in the song's own row.

    Args:
        sampling: settings.
        songs: N.
        vocab_size: V.
        rules: which tokens may come.
        device: of the logits.
    """

    def __init__(
        self, sampling: PlannerSampling, *, songs: int, vocab_size: int, rules: Rules, device: torch.device | str
    ) -> None:
        super().__init__(sampling.configs(songs), batch=songs, vocab_size=vocab_size, device=device)
        self.sampling, self.songs, self.rules = sampling, songs, rules
        self._before, _ = sampling.split()
        self.uses_counts = sampling.repetition_penalty != 1
        self._penalty = torch.tensor([[sampling.repetition_penalty]], device=device)
        self._top_p = torch.tensor([[sampling.top_p]], dtype=torch.float64, device=device)

    @property
    def rows(self) -> int:
        """Of the batch: N, or 2 N with guidance."""
        return self.songs * (2 if self.sampling.guided else 1)

    def __call__(
        self, logits: Tensor, *, draw: Tensor | int, counts: TokenCounts | None = None, logprobs: int | None = None
    ) -> Sampled:
        """Draw.

        Args:
            logits: `[rows, V]`.
            draw: positions `[rows]` of the tokens; those of the songs' own rows count.
            counts: of all rows, for the penalty; those of the songs' own rows count.
            logprobs: None; what is drawn from is not the model's distribution.

        Returns:
            Tokens `[rows]`, the same for both rows of a pair.
        """
        if logits.dim() != 2 or logits.shape[0] != self.rows or logprobs is not None:
            raise ValueError(
                f"GuidedSampler: logits of shape {tuple(logits.shape)}, logprobs {logprobs}: wanted "
                f"{self.rows} rows and no log-probabilities"
            )
        at = torch.full((self.songs,), draw, device=logits.device) if isinstance(draw, int) else draw[: self.songs]
        scores = logits.float()
        for stage in self._before:
            scores = self._apply(stage, scores, at, counts)
        tokens = super().__call__(scores[: self.songs], draw=at).tokens
        return Sampled(tokens.repeat(self.rows // self.songs))

    def _apply(self, stage: Stage, scores: Tensor, at: Tensor, counts: TokenCounts | None) -> Tensor:
        N = self.songs
        if stage == "guidance":
            asked, without = scores[:N], scores[-N:]
            return without + self.sampling.guidance * (asked - without) if self.sampling.guided else scores
        if stage == "rules":
            return self.rules(scores, at)
        if stage == "repetition" and self.uses_counts:
            if counts is None:
                raise ValueError("GuidedSampler: repetition_penalty is on and needs TokenCounts, got none")
            seen = (counts.prompt[:N] + counts.generated[:N]) > 0
            return torch.cat([penalise_repetition(scores[:N], seen, self._penalty), scores[N:]])
        if stage == "top_k" and 0 < self.sampling.top_k < scores.shape[-1]:
            ids = most_likely(clean(scores), self.sampling.top_k)
            return torch.full_like(scores, -torch.inf).scatter(-1, ids, scores.gather(-1, ids))
        if stage == "top_p" and self.sampling.top_p < 1:
            scores = clean(scores)
            return scores.masked_fill(keep_top_p(weigh(scores), self._top_p, scores) == 0, -torch.inf)
        return scores

    def _penalise(self, logits: Tensor, counts: TokenCounts | None) -> Tensor:
        return logits  # done before, at the place that the order gives it


class CodeRules:
    """Codes alone before a song's end, and nothing but the end at it; on the device, by position.

    Args:
        starts: position of every song's first code.
        least: codes before the end may come.
        most: codes after which it must come.
        device: of the scores.
    """

    def __init__(
        self, starts: Sequence[int], least: Sequence[int], most: Sequence[int], device: torch.device | str
    ) -> None:
        self._starts, self._least, self._most = (torch.tensor(list(x), device=device) for x in (starts, least, most))

    def __call__(self, scores: Tensor, at: Tensor) -> Tensor:
        made = at - self._starts
        end = scores[:, -1].masked_fill(made < self._least, -torch.inf)
        over = made >= self._most
        codes = scores[:, :-1].masked_fill(over[:, None], -torch.inf)
        return torch.cat([codes, torch.where(over, 0.0, end)[:, None]], -1)
