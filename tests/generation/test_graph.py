"""A recorded decode step gives the bits of the model, over rings, growing caches and rewinds; or steps aside."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longburn import AttnWindow, CacheManager, RotaryEncoding, WindowPolicy, use_impl
from longburn.generation.graph import DecodeStep
from longburn.kernels import native
from longburn.kernels.native.tape import Tape, Unrecordable, is_recording
from longburn.models.gpt_oss import GptOss
from longburn.models.llama import Llama, LlamaConfig
from longburn.nn import ExpertStorage

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")

GOLDEN = Path(__file__).parent.parent / "models" / "data" / "gpt_oss_tiny_original"

CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    rope=RotaryEncoding(16),
)


def model(policy: WindowPolicy | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(3)
    return Llama(CONFIG, policy=policy, dtype=dtype)


def tokens(count: int, rows: int = 1) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randint(0, CONFIG.vocab_size, (rows, 1), generator=g)


POLICIES = {
    "full": WindowPolicy.full(),
    "window": WindowPolicy.uniform(AttnWindow(7)),
    "sinks": WindowPolicy.uniform(AttnWindow(7, sink_tokens=2)),
    "relative": WindowPolicy.uniform(AttnWindow(7, sink_tokens=2, relative_sinks=True)),
    "every other": WindowPolicy.every_other(5, full_on_even=False),
}


@pytest.mark.parametrize("max_length", [None, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits_before_at_and_after_the_wrap(policy: str, dtype: torch.dtype, max_length: int | None) -> None:
    llama = model(POLICIES[policy], dtype)
    ours, theirs = (llama.init_cache(1, max_length=max_length) for _ in range(2))
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    step = DecodeStep(llama, ours)
    with torch.no_grad():
        llama.forward_logits(prompt, ours), llama.forward_logits(prompt, theirs)
        for token in tokens(40):
            assert torch.equal(step(token), llama.forward_logits(token, theirs))
    assert step.why_not is None
    assert step.tape is not None
    assert ours.position == theirs.position == 45
    for a, b in zip(ours, theirs, strict=True):  # what it leaves behind can be gone on from in any way
        assert torch.equal(a.positions, b.positions)
    with torch.no_grad():
        assert torch.equal(llama.forward_logits(prompt, ours), llama.forward_logits(prompt, theirs))


def test_a_cache_that_grows_is_recorded_again() -> None:
    llama = model()
    ours, theirs = llama.init_cache(1), llama.init_cache(1)
    step, tapes = DecodeStep(llama, ours), set()
    for token in tokens(300):
        with torch.no_grad():
            assert torch.equal(step(token), llama.forward_logits(token, theirs))
        tapes.add(id(step.tape))
    assert ours[0].slots > 256
    assert len(tapes) >= 3  # none yet, before the growth, after it


def test_rewinds_and_resets_between_steps() -> None:
    llama = model(WindowPolicy.uniform(AttnWindow(7, sink_tokens=1)))
    ours, theirs = llama.init_cache(1, slack=4), llama.init_cache(1, slack=4)
    step = DecodeStep(llama, ours)
    for i, token in enumerate(tokens(60)):
        with torch.no_grad():
            assert torch.equal(step(token), llama.forward_logits(token, theirs))
        for cache in (ours, theirs):
            if i % 11 == 10:
                cache.rewind(3)
            if i == 40:
                cache.reset()
    assert step.tape is not None


def test_rows_pause_and_part() -> None:
    """Rows of one clock at first; then one pauses, and from then on each has its own."""
    llama = model(WindowPolicy.uniform(AttnWindow(7, sink_tokens=2)))
    ours, theirs = llama.init_cache(2), llama.init_cache(2)
    step = DecodeStep(llama, ours)
    for i, token in enumerate(tokens(30, rows=2)):
        if i in (9, 10, 20):
            token[i % 2] = -1
        with torch.no_grad():
            got, wanted = step(token), llama.forward_logits(token, theirs)
        held = token[:, 0] >= 0
        assert torch.equal(got[held], wanted[held])


def test_the_full_cache_says_so() -> None:
    llama = model()
    cache = llama.init_cache(1, max_length=4)
    step = DecodeStep(llama, cache)
    for token in tokens(4):
        step(token)
    with pytest.raises(ValueError, match="max_length 4"):
        step(torch.tensor([[1]]))
    assert cache.position == 4
    with pytest.raises(ValueError, match="id 53"):
        step(torch.tensor([[53]]))


def test_a_named_implementation_is_obeyed() -> None:
    llama = model()
    step = DecodeStep(llama, llama.init_cache(1))
    with use_impl("reference"):
        for token in tokens(3):
            step(token)
    assert step.tape is None
    assert "no compiled twin" in (step.why_not or "")


class Counting(Llama):
    """Reads its tokens with Python, which no recorder sees."""

    def forward_logits(self, tokens: Tensor, cache: CacheManager, **options: bool) -> Tensor:
        return super().forward_logits(tokens, cache, **options) + float(tokens.numpy()[0, 0])


class Multiplying(Llama):
    """Has an operator without a twin, after its layers have written."""

    def forward_logits(self, tokens: Tensor, cache: CacheManager, **options: bool) -> Tensor:
        return super().forward_logits(tokens, cache, **options) * 2.0


@pytest.mark.parametrize(("kind", "why"), [(Counting, "add"), (Multiplying, "mul")])
def test_what_cannot_be_recorded_runs_as_it_did(kind: type[Llama], why: str) -> None:
    torch.manual_seed(3)
    llama = kind(CONFIG, policy=WindowPolicy.uniform(AttnWindow(4)))
    ours, theirs = llama.init_cache(1), llama.init_cache(1)
    step = DecodeStep(llama, ours)
    for token in tokens(12):
        with torch.no_grad():
            assert torch.equal(step(token), llama.forward_logits(token, theirs))
    assert step.tape is None
    assert why in (step.why_not or "")


class Peeking(nn.Module):
    """The smallest model that a tape cannot tell from an honest one: its path depends on a number Python read."""

    vocab_size = 53

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        return self.inner.init_cache(batch, max_length=max_length)

    def forward_logits(self, tokens: Tensor, cache: CacheManager, **options: bool) -> Tensor:
        logits = self.inner.forward_logits(tokens, cache, **options)
        return logits if tokens.numpy()[0, 0] % 2 else logits + logits


def test_a_model_that_reads_its_input_is_found_out() -> None:
    llama = Peeking()
    ours, theirs = llama.init_cache(1), llama.init_cache(1)
    step = DecodeStep(llama, ours)
    for token in (torch.tensor([[t]]) for t in (1, 2, 3, 4, 4, 5)):
        with torch.no_grad():
            assert torch.equal(step(token), llama.forward_logits(token, theirs))
    assert step.tape is None
    assert "other numbers" in (step.why_not or "")


def test_a_tape_names_what_it_cannot_take() -> None:
    x = torch.randn(3)
    with torch.no_grad():
        with pytest.raises(Unrecordable, match="sin"):
            Tape(lambda: x.sin(), [x])
        with pytest.raises(Unrecordable, match="mul_"):
            Tape(lambda: x.mul_(2), [x])
        with pytest.raises(Unrecordable, match="scalar"):
            Tape(lambda: x + x[0].item(), [x])
        with pytest.raises(RuntimeError, match="mine"):
            Tape(_fail, [x])
    assert not is_recording()


def _fail() -> Tensor:
    raise RuntimeError("mine")


def test_a_tape_runs_on_what_its_inputs_hold() -> None:
    x, constant = torch.randn(3, 4), torch.randn(4, 3)
    with torch.no_grad():
        tape = Tape(lambda: x + (constant.sin() * 2).T.contiguous(), [x])
        for _ in range(3):
            x.copy_(torch.randn(3, 4))
            assert torch.equal(tape.run(), x + (constant.sin() * 2).T)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_gpt_oss_with_its_experts(experts: ExpertStorage, dtype: torch.dtype, rows: int) -> None:
    """Routing is data, not control flow: which experts are read differs from step to step."""
    gpt_oss = GptOss.from_checkpoint(GOLDEN, dtype=dtype, experts=experts)
    ours, theirs = gpt_oss.init_cache(rows), gpt_oss.init_cache(rows)
    step, chosen = DecodeStep(gpt_oss, ours), set()
    for token in tokens(40, rows):
        with torch.no_grad():
            wanted = gpt_oss.forward_logits(token, theirs)
            got = step(token)
        assert torch.equal(got, wanted)
        chosen.add(got.argmax(-1)[0].item())
    assert step.why_not is None
    assert step.tape is not None
    assert len(chosen) > 5


def test_other_threads_do_not_get_onto_the_tape() -> None:
    """A server decodes in several threads: what one records, the others' launches must stay out of."""
    llama = model()
    stop = threading.Event()

    def noise() -> None:
        with torch.no_grad():
            while not stop.is_set():
                llama(torch.zeros(1, 1, dtype=torch.int64))
                assert not is_recording()

    threads = [threading.Thread(target=noise) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        lengths = set()
        for _ in range(10):
            step = DecodeStep(llama, llama.init_cache(1, max_length=8))
            for token in tokens(3):
                step(token)
            assert step.tape is not None
            lengths.add(len(step.tape))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(lengths) == 1
