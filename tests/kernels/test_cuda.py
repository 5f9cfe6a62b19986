"""The same meaning on a GPU: every implementation that takes a CUDA call, and whole streams. Skipped without one."""

import pytest
import torch

from longburn import AttnWindow, GenerationConfig, RotaryEncoding, WindowPolicy, generate, use_impl
from longburn.kernels.attend import IMPLS, AttendCall, BiasTerms
from longburn.kernels.attend.reference import attend_reference
from longburn.models.llama import Llama, LlamaConfig

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_call(T, S, *, window, sink_tokens, sinks, bias, dtype, ragged):
    torch.manual_seed(T + S)
    B, K, G, D = 2, 2, 3, 64
    q_pos = torch.arange(S - T, S)[None].expand(B, T).clone()
    k_pos = torch.stack([torch.randperm(S) for _ in range(B)])
    if ragged:
        k_pos[1, ::5] = -1
        q_pos[1, :3] = -1
    terms = {
        None: None,
        "slope": BiasTerms(slope=torch.rand(K * G)),
        "table": BiasTerms(table=torch.randn(K * G, 50), zero=3),
        "key": BiasTerms(key=torch.randn(B, K * G, S), row=torch.randn(B, K * G, T)),
        "dense": BiasTerms(dense=torch.randn(1, K * G, T, S)),
    }[bias]
    call = AttendCall(
        q=torch.randn(B, K * G, T, D, dtype=dtype),
        k=torch.randn(B, K, S, D, dtype=dtype),
        v=torch.randn(B, K, S, D, dtype=dtype),
        q_pos=q_pos,
        k_pos=k_pos,
        scale=0.2,
        window=window,
        sink_tokens=sink_tokens if window else 0,
        sinks=3 * torch.randn(K * G) if sinks else None,
        bias=terms,
    )
    empty = (k_pos < 0)[:, None, :, None]
    poisoned = {"k": call.k.masked_fill(empty, float("nan")), "v": call.v.masked_fill(empty, float("nan"))}
    return moved(call, lambda t: t, **poisoned)


def moved(call, to, **changed):
    """The call with `to` applied to every tensor."""
    values = {**vars(call), **changed}
    values["bias"] = None if call.bias is None else BiasTerms(*(to(t) if torch.is_tensor(t) else t for t in call.bias))
    return AttendCall(**{name: to(value) if torch.is_tensor(value) else value for name, value in values.items()})


def exact(call):
    return attend_reference(moved(call, lambda t: t.double() if t.is_floating_point() else t))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("bias", [None, "slope", "table", "key", "dense"])
@pytest.mark.parametrize(("window", "sink_tokens"), [(None, 0), (37, 0), (37, 4)])
@pytest.mark.parametrize(("T", "S"), [(1, 333), (7, 333), (200, 333)])
def test_every_implementation_on_cuda(T, S, window, sink_tokens, bias, sinks, dtype):
    call = make_call(T, S, window=window, sink_tokens=sink_tokens, sinks=sinks, bias=bias, dtype=dtype, ragged=True)
    wanted = exact(call)
    on_gpu = moved(call, lambda t: t.cuda())
    ran = []
    for impl in IMPLS:
        if impl.why_not(on_gpu) is None:
            got = impl.run(on_gpu)[0].cpu().double()
            assert not got.isnan().any(), impl.name
            error = (got - wanted).abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 2e-2) * wanted.abs().max(), (impl.name, error)
            ran.append(impl.name)
    assert "reference" in ran
    if T >= 128:
        assert "flex" in ran


def tiny(window):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope=RotaryEncoding(32),
    )
    return Llama(config, policy=WindowPolicy.uniform(window)).eval()


@pytest.mark.parametrize(
    "window",
    [AttnWindow(), AttnWindow(19), AttnWindow(19, sink_tokens=3), AttnWindow(19, sink_tokens=3, relative_sinks=True)],
)
def test_a_stream_on_cuda_equals_the_cpu(window):
    model, tokens = tiny(window), torch.randint(0, 101, (2, 90))
    cuda = tiny(window).cuda()
    with torch.no_grad():
        with use_impl("reference"):
            wanted = model.forward_logits(tokens, model.init_cache(2), all_positions=True)
        for chunk in (1, 7, 19, 90):
            cache = cuda.init_cache(2)
            parts = [cuda.forward_logits(t.cuda(), cache, all_positions=True) for t in tokens.split(chunk, 1)]
            torch.testing.assert_close(torch.cat(parts, 1).cpu(), wanted, atol=2e-4, rtol=1e-3)


def test_ragged_prompts_on_cuda():
    model = tiny(AttnWindow(19, sink_tokens=3, relative_sinks=True)).cuda()
    prompts = [list(range(1, 40)), list(range(50, 57)), [3]]
    config = GenerationConfig(max_new_tokens=30, chunk_size=8)
    together = list(generate(model, prompts, config=config))
    for row, prompt in enumerate(prompts):
        alone = [event.token for event in generate(model, [prompt], config=config)]
        assert [event.token for event in together if event.row == row] == alone


def test_gradients_through_flex():
    call = make_call(200, 333, window=37, sink_tokens=0, sinks=True, bias="slope", dtype=torch.float32, ragged=False)
    grads = {}
    for name in ("flex", "reference"):
        leaves = moved(call, lambda t: t.cuda().requires_grad_() if t.is_floating_point() else t.cuda())
        impl = next(impl for impl in IMPLS if impl.name == name)
        assert impl.why_not(leaves) is None
        impl.run(leaves)[0].square().sum().backward()
        grads[name] = [leaves.q.grad, leaves.k.grad, leaves.v.grad, leaves.sinks.grad]
    for got, wanted in zip(grads["flex"], grads["reference"], strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)
