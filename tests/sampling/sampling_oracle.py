"""The sampling rules once more, a row at a time in plain Python floats: slow, readable, none of the package's code."""

import math
from collections import Counter
from collections.abc import Sequence

from longburn.sampling import SamplerConfig


def scores(
    logits: Sequence[float], config: SamplerConfig, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> list[float]:
    """Logits after bias, bans and penalties."""
    times = Counter(generated)
    result = []
    for token, logit in enumerate(logits):
        score = -math.inf if math.isnan(logit) else min(logit, 3.4028234663852886e38)
        score += config.logit_bias.get(token, 0.0)
        if token in config.banned_tokens:
            score = -math.inf
        if token in prompt or token in generated:
            score = score / config.repetition_penalty if score > 0 else score * config.repetition_penalty
        score -= config.frequency_penalty * times[token]
        score -= config.presence_penalty if token in times else 0.0
        result.append(score)
    return result


def probabilities(
    logits: Sequence[float], config: SamplerConfig, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> list[float]:
    """The distribution a token is drawn from; all zeros if there is no candidate."""
    row = scores(logits, config, prompt, generated)
    ranked = sorted((t for t in range(len(row)) if row[t] > -math.inf), key=lambda t: (-row[t], t))
    if not ranked:
        return [0.0] * len(row)
    if config.temperature == 0:
        return [float(t == ranked[0]) for t in range(len(row))]
    if config.top_k:
        ranked = ranked[: config.top_k]
    mass = {
        t: math.exp((row[t] - row[ranked[0]]) / (1 if config.temperature_last else config.temperature)) for t in ranked
    }
    if config.top_p < 1:
        total, before, kept = math.fsum(mass.values()), 0.0, []
        for t in ranked:
            if before < config.top_p * total:
                kept.append(t)
            before += mass[t]
        ranked = kept
    ranked = [t for t in ranked if mass[t] >= config.min_p]  # the most likely token has mass 1
    mass = {t: math.exp((row[t] - row[ranked[0]]) / config.temperature) for t in ranked}
    total = math.fsum(mass[t] for t in ranked)
    return [mass[t] / total if t in ranked else 0.0 for t in range(len(row))]
