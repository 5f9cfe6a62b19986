"""`longburn generate`: what it prints, where, and what it says to bad input."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

PROMPT = "Why is the sky blue?"
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


def as_json(invoke, tiny, *arguments, **more):
    outcome = invoke("generate", "--model", tiny, "--json", *arguments, **more)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


def test_tokens_are_those_of_transformers(invoke, tiny) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    for flag, text in (("--raw", PROMPT), ("--chat", f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        reply = as_json(invoke, tiny, "--prompt", PROMPT, flag, *GREEDY, "--chunk-size", "5")
        assert reply["tokens"] == [token for token in wanted if token != 2]
        assert reply["stats"]["prompt_tokens"] == ids.shape[1]
        assert reply["text"] == tokenizer.decode(reply["tokens"], skip_special_tokens=True)


def test_streams_text_to_stdout_and_figures_to_stderr(invoke, tiny) -> None:
    reply = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY)
    outcome = invoke("generate", "--model", tiny, "--prompt", PROMPT, *GREEDY)
    assert outcome.code == 0
    assert outcome.out == reply["text"] + ("" if reply["text"].endswith("\n") else "\n")
    stats = reply["stats"]
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"prefill {stats['prompt_tokens']} tokens at ")
    assert f"decode {stats['new_tokens']} tokens at " in last
    assert last.endswith(f"cache {stats['cache_bytes'] / 2**20:.1f} MiB, position {stats['position']}")


def test_the_last_token_made_has_no_place_in_the_cache_yet(invoke, tiny) -> None:
    reply = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY)
    assert reply["finish"] == "length"
    assert len(reply["tokens"]) == reply["stats"]["new_tokens"] == 12
    assert reply["stats"]["position"] == reply["stats"]["prompt_tokens"] + 12 - 1


@pytest.mark.parametrize("source", ["--prompt", "--prompt-file", "stdin", "dash", "dash-file"])
def test_every_source_gives_the_same_prompt(invoke, tiny, tmp_path: Path, source: str) -> None:
    text = "Ça va? 月 🌙"
    file = tmp_path / "prompt.txt"
    file.write_text(text + "\n", encoding="utf-8")
    piped = {"stdin": f"{text}\n".encode()}
    arguments, more = {
        "--prompt": (("--prompt", text), {}),
        "--prompt-file": (("--prompt-file", file), {}),
        "stdin": ((), piped),
        "dash": (("--prompt", "-"), piped),
        "dash-file": (("--prompt-file", "-"), piped),
    }[source]
    wanted = as_json(invoke, tiny, "-p", text, *GREEDY)
    reply = as_json(invoke, tiny, *arguments, *GREEDY, **more)
    assert (reply["text"], reply["stats"]["prompt_tokens"]) == (wanted["text"], wanted["stats"]["prompt_tokens"])


def test_a_window_bounds_the_cache(invoke, tiny) -> None:
    text = PROMPT * 20
    few, many = (
        as_json(invoke, tiny, "--prompt", text * n, "--window", "16", "--chunk-size", "8", *GREEDY) for n in (1, 4)
    )
    assert few["stats"]["cache_bytes"] == many["stats"]["cache_bytes"]
    assert many["stats"]["cache_bytes"] < as_json(invoke, tiny, "--prompt", text, *GREEDY)["stats"]["cache_bytes"] / 4
    assert many["stats"]["position"] > 3 * few["stats"]["position"]


def test_a_cache_in_fp8_is_smaller(invoke, tiny) -> None:
    model, fp8 = (
        as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY, "--kv-cache", kind)["stats"]["cache_bytes"]
        for kind in ("model", "fp8")
    )
    assert model / 4 < fp8 < model / 2  # of fp32: a quarter, and the scales


def test_sink_tokens_and_positions_reach_the_model(invoke, tiny) -> None:
    def text(*arguments) -> str:
        return as_json(invoke, tiny, "--prompt", PROMPT * 20, "--window", "16", *arguments, *GREEDY)["text"]

    default = text()
    assert text("--sink-tokens", "4", "--positions", "relative") == default
    assert text("--sink-tokens", "4", "--positions", "absolute") != default
    assert text("--sink-tokens", "0") != default


def test_a_seed_fixes_the_text(invoke, tiny) -> None:
    def text(*arguments) -> str:
        return as_json(invoke, tiny, "--prompt", PROMPT, "--max-new-tokens", "20", *arguments)["text"]

    assert text("--seed", "7") == text("--seed", "7") != text("--seed", "8")


def test_a_stop_string_ends_the_text_before_it(invoke, tiny) -> None:
    whole = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY)["text"]
    stop = next(
        whole[i : i + 2]
        for i in range(2, len(whole))
        if whole.index(whole[i : i + 2]) == i and "�" not in whole[i : i + 2]
    )
    reply = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY, "--stop", "never said", "--stop", stop)
    assert reply["finish"] == "stop_string"
    assert reply["text"] == whole[: whole.index(stop)]


def test_a_stop_token_ends_the_text_and_is_left_out(invoke, tiny, tmp_path: Path) -> None:
    tokens = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY)["tokens"]
    model = damage(tiny, tmp_path)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, tokens[4]]}))
    reply = as_json(invoke, model, "--prompt", PROMPT, *GREEDY)
    assert reply["finish"] == "stop_token"
    assert reply["tokens"] == tokens[: tokens.index(tokens[4])]


@pytest.mark.parametrize("flags", [("--json",), ()])
def test_ctrl_c_ends_after_the_token_in_work(invoke, tiny, monkeypatch: pytest.MonkeyPatch, flags) -> None:
    from longburn.generation.graph import DecodeStep

    whole = as_json(invoke, tiny, "--prompt", PROMPT, *GREEDY)
    step, calls = DecodeStep.__call__, []

    def interrupted(self, tokens):
        calls.append(tokens)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, tokens)

    monkeypatch.setattr(DecodeStep, "__call__", interrupted)
    outcome = invoke("generate", "--model", tiny, "--prompt", PROMPT, *GREEDY, *flags)
    assert outcome.code == 130
    assert outcome.out.endswith("\n")
    if flags:
        reply = json.loads(outcome.out)
        assert (reply["tokens"], reply["finish"]) == (whole["tokens"][:5], "cancelled")
    else:
        assert whole["text"].startswith(outcome.out[:-2])
        assert len(outcome.out) > 3
    assert outcome.err.startswith("prefill ")


def test_ctrl_c_while_the_prompt_is_read(invoke, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from longburn.models.llama import Llama

    forward = Llama.forward_logits

    def interrupted(self, *arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Llama, "forward_logits", interrupted)
    outcome = invoke("generate", "--model", tiny, "--prompt", PROMPT, "--chunk-size", "5")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.startswith("prefill 5 tokens at ")
    assert outcome.err.endswith(", decode 0 tokens at 0.0 tokens/s, cache 0.1 MiB, position 5\n")


def test_raw_is_the_default_without_a_chat_template(invoke, tiny_base) -> None:
    default, raw = (as_json(invoke, tiny_base, "--prompt", PROMPT, *GREEDY, *flags) for flags in ((), ("--raw",)))
    assert default["tokens"] == raw["tokens"]
    outcome = invoke("generate", "--model", tiny_base, "--prompt", PROMPT, "--chat")
    assert outcome.code == 1
    assert "no chat template" in outcome.err


USAGE = [
    (("--window", "0"), "'--window': Input should be greater than or equal to 1, got '0'"),
    (("--window", "-3"), "got '-3'"),
    (("--window", "many"), "got 'many'"),
    (("--window", "8", "--sink-tokens", "-1"), "--sink-tokens"),
    (("--sink-tokens", "4"), "--sink-tokens 4 says what happens beyond a window: give --window too"),
    (("--positions", "absolute"), "give --window too"),
    (("--window", "8", "--positions", "sideways"), "'sideways'"),
    (("--chunk-size", "0"), "--chunk-size"),
    (("--max-new-tokens", "0"), "--max-new-tokens"),
    (("--temperature", "-1"), "--temperature"),
    (("--temperature", "nan"), "temperature"),
    (("--top-p", "0"), "top_p"),
    (("--top-k", "-1"), "--top-k"),
    (("--min-p", "2"), "--min-p"),
    (("--repetition-penalty", "0"), "repetition_penalty"),
    (("--seed", "-1"), "seed"),
    (("--dtype", "int8"), "'int8'"),
    (("--device", "toaster"), "--device 'toaster'"),
    (("--device", "meta"), "--device 'meta'"),
    (("--threads", "0"), "--threads"),
    (("--threads", "99999"), "--threads 99999: wanted at most"),
    (("--impl", "magic"), "no implementation is called 'magic'; there are auto, "),
    (("--stop", ""), "--stop"),
    (("--prompt-file", "x"), "one source"),
    (("--no-such-option",), "--no-such-option"),
]


@pytest.mark.parametrize(("arguments", "said"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_wrong_usage_is_one_line_and_exit_2(invoke, tiny, arguments, said) -> None:
    outcome = invoke("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", "1", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("longburn: error: ")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
    assert "longburn generate --help" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(("--prompt", ""), b"x"), ((), b""), (("--prompt", "-"), b"\n")],
)
def test_an_empty_prompt_is_wrong_usage(invoke, tiny, arguments, stdin) -> None:
    outcome = invoke("generate", "--model", tiny, *arguments, stdin=stdin)
    assert outcome.code == 2
    assert "is empty" in outcome.err


def test_no_prompt_on_a_terminal_is_wrong_usage(invoke, tiny) -> None:
    outcome = invoke("generate", "--model", tiny, terminal=True)
    assert outcome.code == 2
    assert "no prompt: give --prompt or --prompt-file, or pipe text into stdin" in outcome.err


def damage(directory: str, to: Path, **changes) -> Path:
    """A copy of the model with keys of config.json changed; None removes one."""
    copy = to / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


def failed(outcome, *said: str) -> None:
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("longburn: error: ")
    assert outcome.err.count("\n") == 1
    for part in said:
        assert part in outcome.err


def test_a_missing_model_is_one_line(invoke, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.gguf"
    failed(invoke("generate", "--model", missing, "--prompt", "x"), str(missing))
    failed(invoke("generate", "--model", "no-such-name", "--prompt", "x"), "no-such-name", "smollm2")


def test_a_missing_prompt_file_is_one_line(invoke, tiny, tmp_path: Path) -> None:
    failed(invoke("generate", "--model", tiny, "-f", tmp_path / "none.txt"), "none.txt", "No such file")
    failed(invoke("generate", "--model", tiny, "-f", tmp_path), str(tmp_path), "Is a directory")


def test_a_prompt_that_is_not_text_is_one_line(invoke, tiny) -> None:
    failed(invoke("generate", "--model", tiny, stdin=b"good \xff bad"), "stdin: not UTF-8 text: byte 0xff at offset 5")


def test_wrong_magic_and_truncation_are_one_line(invoke, tiny, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGML" + bytes(64))
    failed(invoke("generate", "--model", wrong, "--prompt", "x"), "wrong.gguf", "GGUF")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00" + (1).to_bytes(8, "little") * 2)
    failed(invoke("generate", "--model", cut, "--prompt", "x"), "cut.gguf", "truncated")


def test_a_truncated_safetensors_file_is_one_line(invoke, tiny, tmp_path: Path) -> None:
    weights = damage(tiny, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failed(invoke("generate", "--model", weights.parent, "--prompt", "x"), "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["PigeonForCausalLM"], "model_type": "pigeon"}, "igeon"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}, "rope_parameters": None}, "spiral"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "wobble": 3}}, "wobble"),
        ({"intermediate_size": 96}, "gate_proj.weight [80, 48]"),
    ],
    ids=["architecture", "rope type", "rope key", "shape"],
)
def test_a_config_that_does_not_fit_is_one_line(invoke, tiny, tmp_path: Path, changes, said) -> None:
    failed(invoke("generate", "--model", damage(tiny, tmp_path, **changes), "--prompt", "x"), said)


def test_nan_weights_are_one_line(invoke, tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = damage(tiny, tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    failed(invoke("generate", "--model", weights.parent, "--prompt", "x"), "model.layers.1.mlp.up_proj.weight")


def test_an_implementation_that_cannot_says_why(invoke, tiny) -> None:
    failed(invoke("generate", "--model", tiny, "--prompt", "x", "--impl", "flex", "--device", "cpu"), "flex", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_line(invoke, tiny) -> None:
    failed(
        invoke("generate", "--model", tiny, "--prompt", "x", "--device", "cuda"), "--device cuda", "sees 0 CUDA devices"
    )


def test_debug_shows_the_traceback(invoke, tiny, tmp_path: Path) -> None:
    for arguments in (("--debug", "generate"), ("generate", "--debug")):
        with pytest.raises(OSError, match="No such file"):
            invoke(*arguments, "--model", tiny, "-f", tmp_path / "none.txt")


def test_a_defect_is_one_line_too(invoke, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **options):
        raise TypeError("one\n\ntwo\nthree")

    monkeypatch.setattr("longburn.models.load_model", broken)
    failed(
        invoke("generate", "--model", tiny, "--prompt", "x"),
        "unexpected TypeError (--debug shows where): one: two (and 1 more;",
    )
