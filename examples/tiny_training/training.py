"""The training loop: the library's own forward, AdamW, and weights that learn to be rounded to MXFP4.

The optimizer moves fp32 weights. The model holds what would be shipped of them: rounded to its own type and, in the
later part of the training, the experts to MXFP4. Gradients are taken there and applied to the fp32 weights as if
nothing had been rounded (straight-through; Bengio et al., arXiv 1308.3432).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.kernels.linear import linear
from longburn.kernels.mxfp4 import dequantize, quantize
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.nn import MoE
from longburn.rope import ntk_yarn
from tiny_training.corpus import Corpus, Part

EXPERTS = ("experts.gate_up", "experts.down")  # how the names of the weights end that are shipped as MXFP4


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: how often each token is seen, if the time allows.
        seconds: after which the training ends wherever it is; the learning rate has fallen to 0 by then.
        context, batch: tokens a sequence, sequences a step.
        learning_rate: its highest value. It rises over the first `warmup` of the run, and from `decay` on falls to 0.
        weight_decay: of matrices.
        clip: of the norm of all gradients.
        balance: weight of the loss that keeps the experts equally busy (Fedus et al., arXiv 2101.03961, eq. 4).
        rounded: the part of the run from which the experts are rounded to MXFP4.
        evaluations: how often the validation part is read.
    """

    epochs: float
    seconds: float
    weight_decay: float = 0.1
    context: int = 1024
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: float = 0.03
    decay: float = 0.5
    clip: float = 1.0
    balance: float = 0.01
    rounded: float = 0.5
    evaluations: int = 24
    seed: int = 0

    def rate(self, progress: float) -> float:
        """The learning rate when this part of the run (0 to 1) is done."""
        rising = min(1.0, progress / self.warmup) if self.warmup else 1.0
        falling = min(1.0, (1 - progress) / (1 - self.decay))
        return self.learning_rate * rising * max(falling, 0.0)


def tiny_config(vocabulary: int) -> GptOssConfig:
    """15.9 million parameters: 8 layers, 8 experts of which 4 are chosen, YaRN from 256 to 1024 positions."""
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=224,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=4,
        sliding_window=128,
        rope=ntk_yarn(32, theta=10_000.0, factor=4.0, original_context=256, truncate=False),
        max_position_embeddings=1024,
    )


class Master:
    """The fp32 weights of a model, and what the model is given of them."""

    def __init__(self, model: nn.Module) -> None:
        self._held = dict(model.named_parameters())
        self.weights = {name: p.detach().float().clone().requires_grad_() for name, p in self._held.items()}

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: only matrices decay, not biases, norms and sinks."""
        matrices = [w for name, w in self.weights.items() if w.dim() > 1 and not name.endswith("bias")]
        rest = [w for name, w in self.weights.items() if w.dim() <= 1 or name.endswith("bias")]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def take_gradients(self) -> None:
        """The model's gradients, in fp32."""
        for name, held in self._held.items():
            assert held.grad is not None, name
            self.weights[name].grad = held.grad.float()
            held.grad = None

    @torch.no_grad()
    def write(self, *, rounded: bool) -> None:
        """Give the model its weights, experts rounded to MXFP4 if `rounded`."""
        torch._foreach_copy_(list(self._held.values()), list(self.weights.values()))
        for ending in EXPERTS if rounded else ():
            names = [name for name in self.weights if name.endswith(ending)]
            values = dequantize(quantize(torch.stack([self.weights[name] for name in names])))
            torch._foreach_copy_([self._held[name] for name in names], list(values))


class Balance:
    """How unevenly the routers choose: 1 a layer when every expert is equally busy."""

    def __init__(self, model: GptOss) -> None:
        self._parts: list[Tensor] = []
        for layer in model.layers:
            self._watch(layer.mlp)

    def loss(self) -> Tensor:
        """The mean over the layers since the last call."""
        mean = torch.stack(self._parts).mean()
        self._parts.clear()
        return mean

    def _watch(self, moe: MoE) -> None:
        route = moe.route

        def watched(x: Tensor) -> tuple[Tensor, Tensor]:
            chosen, weights = route(x)
            if torch.is_grad_enabled():
                likely = linear(x, moe.router.weight, moe.router.bias).softmax(-1, dtype=torch.float32).mean(0)
                experts = torch.arange(len(likely), device=x.device)
                busy = (chosen[..., None] == experts).float().mean((0, 1))
                self._parts.append(len(likely) * (busy * likely).sum())
            return chosen, weights

        moe.route = watched  # type: ignore[method-assign]


def initialise(model: GptOss) -> None:
    """Normal weights, smaller in wide layers, and in deep models where they write to the stream; sinks and biases 0."""
    layers = len(model.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            std = 0.02 if name in ("embed.weight", "head.weight") else 0.5 * parameter.shape[-1] ** -0.5
            writes = name.endswith(("attention.out.weight", "experts.down"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * layers) if writes else std)
        elif name.endswith(("bias", "sinks")):
            nn.init.zeros_(parameter)


def batches(tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences and what follows each of their tokens, `[batch, context]` each; every epoch is cut elsewhere."""
    T = recipe.context
    while True:
        first = int(torch.randint(T, (), generator=generator))
        cuts = (len(tokens) - 1 - first) // T
        order = torch.randperm(cuts, generator=generator).to(tokens.device)
        for start in range(0, cuts - recipe.batch + 1, recipe.batch):
            at = first + order[start : start + recipe.batch, None] * T + torch.arange(T, device=tokens.device)
            yield tokens[at], tokens[at + 1]


@torch.no_grad()
def bits_per_byte(model: GptOss, part: Part, context: int, batch: int) -> float:
    """Of all tokens but the first, read in stretches of `context`, each predicted from its stretch alone."""
    tokens = part.tokens.to(next(model.parameters()).device)
    nll = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for x, y in _stretches(tokens, context, batch):
        nll += F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum").double()
    return nll.item() / math.log(2) / part.size


def _stretches(tokens: Tensor, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    whole = (len(tokens) - 1) // context
    for start in range(0, whole, batch):
        stop = min(start + batch, whole)
        at = slice(start * context, stop * context)
        yield tokens[at].view(-1, context), tokens[1:][at].view(-1, context)
    if rest := (len(tokens) - 1) % context:
        yield tokens[None, -rest - 1 : -1], tokens[None, -rest:]


def train(
    config: GptOssConfig,
    corpus: Corpus,
    recipe: Recipe,
    device: torch.device,
    keep: Callable[[Master, dict[str, Any]], None],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a model from nothing; returns the log. What `keep` was given stays, should it fail.

    Args:
        keep: called with the weights and the entry of the log, each time the validation loss with rounded experts is
            the lowest so far.
        say: is given one line for each evaluation.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GptOss(config, dtype=torch.float32)
    initialise(model)
    model = model.to(device)
    master = Master(model)  # of the fp32 values, before they are rounded
    model = model.to(dtype)
    balance = Balance(model)
    optimizer = torch.optim.AdamW(
        master.groups(recipe.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    tokens = corpus.train.tokens.to(device)
    steps = max(1, int(recipe.epochs * len(tokens) / (recipe.batch * recipe.context)))
    source = batches(tokens, recipe, torch.Generator().manual_seed(recipe.seed))
    entries: list[dict[str, Any]] = []
    best, began, progress, step = math.inf, time.perf_counter(), 0.0, 0
    running = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, and of how many
    while progress < 1:
        rounded = progress >= recipe.rounded
        master.write(rounded=rounded)
        x, y = next(source)
        loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
        (loss + recipe.balance * balance.loss()).backward()
        master.take_gradients()
        nn.utils.clip_grad_norm_(list(master.weights.values()), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(progress)
        optimizer.step()
        running += torch.stack([loss.detach().double(), torch.ones_like(running[0])])
        step += 1
        progress = max(step / steps, (time.perf_counter() - began) / recipe.seconds)
        if progress >= min((len(entries) + 1) / recipe.evaluations, 1):
            rounded = rounded or progress >= 1  # what is kept at the end is what would be shipped
            total, count = running.tolist()
            if not math.isfinite(total):
                raise FloatingPointError(f"step {step}: the loss is {total}; lower --learning-rate")
            entry = {
                "step": step,
                "tokens": step * recipe.batch * recipe.context,
                "seconds": round(time.perf_counter() - began, 1),
                "learning_rate": recipe.rate(progress),
                "train_loss": round(total / count, 4),
                "rounded": rounded,
            }
            master.write(rounded=rounded)
            entry["validation_bits_per_byte"] = bits_per_byte(model, corpus.validation, recipe.context, recipe.batch)
            entries.append(entry)
            running.zero_()
            say(" ".join(f"{key} {value:.6g}" for key, value in entry.items()))
            if rounded and entry["validation_bits_per_byte"] < best:
                best = entry["validation_bits_per_byte"]
                keep(master, entry)
    return {"recipe": asdict(recipe), "steps": step, "entries": entries, "best": best}
