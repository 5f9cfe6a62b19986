"""The options that `generate` and `chat` share, as one frozen dataclass, and what they mean to the library."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from longburn.cli.display import progress
from longburn.cli.stream import Stream, interruptible

if TYPE_CHECKING:
    import torch

    from longburn.cache import AttnWindow
    from longburn.generation import GenerationConfig
    from longburn.sampling import SamplerConfig

DEFAULT_SINK_TOKENS = 4

MODEL, CHAT, CACHE, SAMPLING, MACHINE = "Model", "Chat", "Cache", "Sampling", "Machine"


@dataclass
class Session:
    """What an option tells the entry point about this run of the command."""

    debug: bool = False
    command: str = "longburn"  # as typed so far, to point to its help


def set_debug(context: typer.Context, wanted: bool) -> bool:
    if wanted and isinstance(context.obj, Session):
        context.obj.debug = True
    return wanted


Debug = Annotated[bool, typer.Option("--debug", callback=set_debug, help="Show the traceback when something fails.")]


@dataclass(frozen=True)
class RunOptions:
    """Which model runs, how its cache rolls, and how the next token is chosen."""

    model: Annotated[
        str,
        typer.Option(
            help="A name from 'longburn models', a .gguf file, or a directory in Hugging Face layout.",
            rich_help_panel=MODEL,
        ),
    ] = "smollm2"
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 512
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given several times.", show_default=False)
    ] = None
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            "--developer",
            help="Instructions for the whole conversation: the system's message, or the developer's in Harmony.",
            rich_help_panel=CHAT,
            show_default=False,
        ),
    ] = None
    reasoning: Annotated[
        Literal["low", "medium", "high"] | None,
        typer.Option(
            help="How much the model thinks before it answers (GPT-OSS). Default: medium.",
            rich_help_panel=CHAT,
            show_default=False,
        ),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attend to this many last tokens (the newest included) and keep no others: constant memory. "
            "Default: all tokens.",
            rich_help_panel=CACHE,
        ),
    ] = None
    sink_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --window: this many first tokens stay visible for ever. Default: 4.",
            rich_help_panel=CACHE,
        ),
    ] = None
    positions: Annotated[
        Literal["absolute", "relative"] | None,
        typer.Option(
            help="With --window: where the sink tokens seem to stand: at their own positions, or never farther back "
            "than the window's edge. Default: relative, which holds for any length.",
            rich_help_panel=CACHE,
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read the prompt this many tokens at a time. Default: 1024 on the CPU, 8192 on a GPU.",
            rich_help_panel=CACHE,
            show_default=False,
        ),
    ] = None
    kv_cache: Annotated[
        Literal["model", "fp8"],
        typer.Option(
            help="Keep keys and values in the model's type, or in fp8: fewer bytes to read, and other roundings.",
            rich_help_panel=CACHE,
        ),
    ] = "model"
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.", rich_help_panel=SAMPLING)
    ] = 0.7
    top_k: Annotated[
        int, typer.Option(min=0, help="Choose among the k likeliest tokens; 0: all.", rich_help_panel=SAMPLING)
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Choose among the likeliest tokens that reach p.", rich_help_panel=SAMPLING
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Choose among tokens at least this likely relative to the likeliest.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens already seen become less likely.", rich_help_panel=SAMPLING)
    ] = 1.0
    frequency_penalty: Annotated[
        float, typer.Option(help="Taken off a token's logit for each time it was seen.", rich_help_panel=SAMPLING)
    ] = 0.0
    presence_penalty: Annotated[
        float, typer.Option(help="Taken off a token's logit once it was seen.", rich_help_panel=SAMPLING)
    ] = 0.0
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text.", rich_help_panel=SAMPLING)] = (
        None
    )
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the weights and the cache. Default: float32 on the CPU, bfloat16 on a GPU.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is cuda where there is one.", rich_help_panel=MACHINE)
    ] = "auto"
    impl: Annotated[
        str, typer.Option(help="Implementation of attention; auto takes the fastest.", rich_help_panel=MACHINE)
    ] = "auto"
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.", rich_help_panel=MACHINE)
    ] = None
    debug: Debug = False

    def attn_window(self) -> "AttnWindow | None":
        """The window that every layer gets; None for full attention."""
        from longburn.cache import AttnWindow

        if self.window is None:
            for name, value in (("--sink-tokens", self.sink_tokens), ("--positions", self.positions)):
                if value is not None:
                    raise typer.BadParameter(f"{name} {value} says what happens beyond a window: give --window too")
            return None
        sink_tokens = DEFAULT_SINK_TOKENS if self.sink_tokens is None else self.sink_tokens
        relative = self.positions != "absolute" and sink_tokens > 0
        return AttnWindow(self.window, sink_tokens=sink_tokens, relative_sinks=relative)

    def sampler(self) -> "SamplerConfig":
        """How the next token is chosen. A value out of range is wrong usage."""
        from longburn.sampling import SamplerConfig

        try:
            return SamplerConfig(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                seed=self.seed,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    def generation(self) -> "GenerationConfig":
        """When a reply ends, and in which pieces its prompt is read; the model's stop tokens come with the model."""
        from longburn.generation import GenerationConfig

        if self.stop and "" in self.stop:
            raise typer.BadParameter("--stop '': wanted a text, an empty one would stop at once")
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, chunk_size=self.chunk_size, stop_strings=tuple(self.stop or ())
        )

    def check_machine(self) -> None:
        """Raises BadParameter for an implementation that does not exist or more threads than there are processors."""
        from longburn.kernels.registry import ImplError, use_impl

        processors = os.cpu_count() or 1
        if self.threads and self.threads > processors:
            raise typer.BadParameter(f"--threads {self.threads}: wanted at most {processors}, one a processor")
        try:
            with use_impl(self.impl):
                pass
        except ImplError as error:
            raise typer.BadParameter(f"--impl {self.impl!r}: {error}") from error

    def start(self) -> Stream:
        """Reads the model from disk, with a bar on the terminal, and makes its cache. Wrong usage is told before."""
        # A flag, because the import of PyTorch has places that swallow a KeyboardInterrupt.
        with interruptible() as interrupted, progress(f"loading {self.model}", count="share") as show:
            import torch

            from longburn.models import load_model

            window, config, sampler, device = (
                self.attn_window(),
                self.generation(),
                self.sampler(),
                torch_device(self.device),
            )
            self.check_machine()
            check_model(self.model)
            if self.threads:
                torch.set_num_threads(self.threads)

            def on_progress(done: int, total: int) -> None:
                if interrupted():
                    raise KeyboardInterrupt
                show(done, total)

            dtype = getattr(torch, self.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
            try:
                loaded = load_model(self.model, dtype=dtype, device=device, window=window, progress=on_progress)
            except ValueError as error:
                if self.model in str(error):
                    raise
                raise ValueError(f"--model {self.model}: {error}") from error
            if interrupted():
                raise KeyboardInterrupt
        config = replace(config, stop_tokens=loaded.tokenizer.stop_tokens)
        cache = loaded.model.init_cache(1, packed=self.kv_cache == "fp8")
        return Stream(loaded, cache, config, sampler, self.impl)


def torch_device(name: str) -> "torch.device":
    """Where a model runs. A device that is not there is a failure, one that is none is wrong usage."""
    import torch

    there = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {name!r}: wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) sees {there} CUDA devices")
    return device


def check_model(model: str) -> None:
    """Raises OSError, with what to do, unless `model` is a path or a named model that is here."""
    from longburn.weights import StoreError, available, locate

    if Path(model).exists():
        return
    names = [entry.name for entry in available() if entry.kind == "model"]
    if model not in names:
        raise OSError(f"--model {model}: no such file or directory, nor one of the named models ({', '.join(names)})")
    try:
        locate(model)
    except StoreError as error:
        raise OSError(f"{error}: longburn models get {model}") from error


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option for each field of the dataclass `options`, which is its first parameter.

    Typer reads a command's options from its signature; this writes the fields into it, so that commands share them.
    """
    annotations = get_type_hints(options, include_extras=True)
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name])
        for field in fields(options)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(command, eval_str=True).parameters.values())[1:]
        own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]

        def run(**values: Any) -> None:
            command(options(**{parameter.name: values.pop(parameter.name) for parameter in shared}), **values)

        run.__doc__ = command.__doc__
        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]  # inspect reads it
        return run

    return decorate
