"""Text under a grammar: the model proposes, the grammar masks, and the host reads every token."""

import torch
from torch import Tensor

from longburn.generation.loop import GenerationError
from longburn.models.ace_step.planner.codes import padded
from longburn.models.ace_step.planner.grammar import Draw, Forced, Writing
from longburn.models.ace_step.planner.sampling import GuidedSampler, PlannerSampling
from longburn.models.decoder import Decoder
from longburn.sampling import TokenCounts


@torch.no_grad()
def write(
    model: Decoder, prompts: list[list[int]], writing: Writing, sampling: PlannerSampling, first_code: int
) -> dict[str, str]:
    """Drive a grammar. What is forced is read together with what was drawn before it, in one call.

    Args:
        model: the language model.
        prompts: of the song and, with guidance, of its counterpart; both go on with the same tokens.
        writing: see `Grammar.write`.
        sampling: settings.
        first_code: the token from which on there are codes only, valid or not.

    Returns:
        The text of every field.

    Raises:
        GenerationError: the model gave nothing to choose from.
    """
    cache, V = model.init_cache(len(prompts)), model.vocab_size
    rules = _TextRules(first_code)
    sampler = GuidedSampler(sampling, songs=1, vocab_size=V, rules=rules, device=cache.device)
    counts = TokenCounts.zeros(len(prompts), V, cache.device) if sampler.uses_counts else None
    if counts is not None:
        counts.add_prompt(padded(prompts).to(cache.device))
    unread, position, logits = prompts, len(prompts[0]), None
    ask = next(writing)
    while True:
        if isinstance(ask, Forced):
            came = list(ask.tokens)
        else:
            if logits is None or unread[0]:
                logits = model.forward_logits(padded(unread), cache)
                unread = [[] for _ in prompts]
            rules.ask = ask
            token = int(sampler(logits, draw=position, counts=counts).tokens[0])
            if token < 0 and not rules.ended:
                raise GenerationError("Planner: no logit that may come is finite; the weights may hold NaN")
            came = [] if rules.ended else [token]
        unread = [[*row, *came] for row in unread]
        position += len(came)
        if counts is not None and came:
            counts.add_generated(torch.tensor([came] * len(prompts), device=cache.device))
        try:
            ask = writing.send(came[-1] if came else -1)
        except StopIteration as done:
            values: dict[str, str] = done.value
            return values


class _TextRules:
    """What a grammar allows at this step. It may look at the scores on the host."""

    def __init__(self, first_code: int) -> None:
        self._first_code = first_code  # the names of codes, valid or not, end the vocabulary
        self.ask, self.ended = Draw(), False

    def __call__(self, scores: Tensor, at: Tensor) -> Tensor:
        ask = self.ask
        self.ended = ask.ends is not None and ask.ends(int(scores[0].argmax()))
        if ask.allowed is None:
            kept = scores.clone()
            kept[:, self._first_code :] = -torch.inf
            kept[:, list(ask.banned)] = -torch.inf
        else:
            ids = torch.tensor([ask.allowed], device=scores.device)
            kept = torch.full_like(scores, -torch.inf).scatter(-1, ids, scores.gather(-1, ids))
        if ask.surest:
            best, token = kept.max(-1, keepdim=True)
            kept = torch.full_like(scores, -torch.inf).scatter(-1, token, best)
        return kept
