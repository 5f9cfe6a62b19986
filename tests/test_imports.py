"""The package's imports run one way, and importing it stays light.

The sources are parsed, not imported: every import counts, also one inside a function or under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "longburn"

# Each package may import from the layers below its own, never sideways or upwards.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"kernels"}),
    frozenset({"cache", "rope", "bias"}),
    frozenset({"attention"}),
    frozenset({"nn", "generation", "interact"}),
    frozenset({"models"}),
    frozenset({"cli"}),
)
# Beside the layers: each sees only itself and what is named here.
ASIDE: dict[str, frozenset[str]] = {
    "sampling": frozenset({"kernels"}),
    "weights": frozenset({"kernels"}),
    "text": frozenset({"weights"}),
    "diffusion": frozenset({"kernels"}),
}
# Who may look aside. Models and the command line may use everything.
LOOKS_ASIDE: dict[str, frozenset[str]] = {
    "generation": frozenset({"sampling", "text"}),
    "interact": frozenset({"sampling"}),
    "models": frozenset(ASIDE),
    "cli": frozenset(ASIDE),
}
# Loaded where they are first used: optional, slow to import, or absent on some machines.
NEVER_AT_MODULE_LEVEL = {
    *("triton", "transformers", "matplotlib", "tiktoken", "openai_harmony", "diffusers"),
    *("gymnasium", "minigrid", "PIL", "av"),
}
# Triton's kernels are the exception: they are decorated when their module is loaded, so nobody else loads it at once.
TRITON_KERNELS = "kernels/triton"
# And an environment cannot be defined without gymnasium.
ENVIRONMENT = "interact/env.py"
# The command line must answer --help at once: nothing heavy until a command runs.
LIGHT_AT_MODULE_LEVEL = {"typer", "rich", "click", "longburn.cli"} | set(sys.stdlib_module_names)

MAX_LINES = 320
LONGER_FOR_A_REASON: dict[str, str] = {}


@dataclass(frozen=True)
class Import:
    """One imported name: `from longburn.cache import AttnWindow` is "longburn.cache.AttnWindow"."""

    target: str
    line: int
    at_module_level: bool


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """All imports of a module that lies in `package` (dotted name, for relative imports)."""

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, base]) if base else ".".join(parents)
                yield from (Import(f"{base}.{alias.name}", node.lineno, at_module_level) for alias in node.names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in node.body:
                    yield from visit(child, False)
                for child in node.orelse:
                    yield from visit(child, at_module_level)
            case _:
                inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, inside)

    return visit(tree, True)


def may_import(package: str) -> frozenset[str]:
    """The packages of longburn that `package` may import from."""
    if package in ASIDE:
        return ASIDE[package] | {package}
    level = next((n for n, layer in enumerate(LAYERS) if package in layer), None)
    assert level is not None, f"src/longburn/{package}: new package, give it a place in LAYERS or ASIDE"
    return frozenset({package}).union(*LAYERS[:level], LOOKS_ASIDE.get(package, ()))


def violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """What the module at `path` (below src/longburn) must not do, one line each."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    package = parts[0] if len(parts) > 1 else ""
    dotted = ".".join(["longburn", *parts[:-1]])
    for found in imports(tree, dotted):
        where = f"{path.relative_to(SOURCE.parent.parent)}:{found.line}"
        root, _, rest = found.target.partition(".")
        kernel = path.parent == SOURCE / TRITON_KERNELS and path.name != "__init__.py"
        late = (root == "triton" and kernel) or (root == "gymnasium" and path == SOURCE / ENVIRONMENT)
        if found.at_module_level and root in NEVER_AT_MODULE_LEVEL and not late:
            yield f"{where} imports {root} at module level"
        if found.at_module_level and not kernel and loads_a_kernel(found.target):
            yield f"{where} imports {found.target} at module level, and with it triton"
        if found.at_module_level and (found.target + ".").startswith("longburn.interact.env."):
            yield f"{where} imports {found.target} at module level, and with it gymnasium"
        if package == "cli" and found.at_module_level:
            light = root in LIGHT_AT_MODULE_LEVEL or found.target.startswith("longburn.cli.")
            if not light:
                yield f"{where} imports {found.target} at module level; import it inside the command"
        if root != "longburn":
            continue
        target = rest.partition(".")[0]
        if not package:  # the door and other modules beside the packages
            if target in {"cli", "models"}:
                yield f"{where} imports longburn.{target}, which users reach by path"
        elif not (SOURCE / target).is_dir():
            yield f"{where} imports {target or 'the root'} from the package's own door"
        elif target not in may_import(package):
            yield f"{where}: {package} must not import longburn.{target}"


def loads_a_kernel(target: str) -> bool:
    """Whether an import of this dotted name loads a module of Triton kernels."""
    rest = target.removeprefix(f"longburn.{TRITON_KERNELS.replace('/', '.')}.")
    return rest != target and (SOURCE / TRITON_KERNELS / f"{rest.partition('.')[0]}.py").is_file()


MODULES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    assert list(violations(path, ast.parse(path.read_text(encoding="utf-8")))) == []


def test_no_public_name_is_a_package() -> None:
    """A package that is called like a function takes its place at the door as soon as it is imported."""
    import longburn

    for name in longburn.__all__:
        assert not isinstance(getattr(longburn, name), ModuleType), f"longburn.{name} is a module"
        assert not (SOURCE / name).exists(), f"src/longburn/{name} is called like the public name {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_stay_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    name = str(path.relative_to(SOURCE))
    assert lines <= MAX_LINES or name in LONGER_FOR_A_REASON, (
        f"{name} has {lines} lines, more than {MAX_LINES}: split it, or list it with the reason"
    )


@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("kernels/attend/core.py", "from longburn.cache import AttnWindow", "kernels must not import longburn.cache"),
        ("kernels/attend/core.py", "def f():\n    import longburn.sampling", "must not import longburn.sampling"),
        ("cache/rolling.py", "from ..attention.core import attend", "cache must not import longburn.attention"),
        ("cache/rolling.py", "from longburn.rope import RotaryEncoding", "cache must not import longburn.rope"),
        ("weights/gguf.py", "from .. import models", "weights must not import longburn.models"),
        ("sampling/sample.py", "import longburn.cache", "sampling must not import longburn.cache"),
        ("nn/norm.py", "from longburn import attend", "from the package's own door"),
        ("nn/norm.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    pass", "imports triton"),
        ("models/llama.py", "class A:\n    from transformers import AutoModel", "imports transformers"),
        ("kernels/linear.py", "from longburn.kernels.triton.tiles import relative", "and with it triton"),
        ("kernels/triton/__init__.py", "import triton", "imports triton"),
        ("interact/world.py", "import gymnasium", "imports gymnasium"),
        ("interact/loop.py", "from longburn.interact.env import WorldModelEnv", "and with it gymnasium"),
        ("cli/main.py", "import torch", "inside the command"),
        ("cli/main.py", "from longburn.generation import generate", "inside the command"),
        ("__init__.py", "from longburn.models import llama", "reach by path"),
    ],
)
def test_the_check_sees(module: str, code: str, complaint: str) -> None:
    found = list(violations(SOURCE / module, ast.parse(code)))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("attention/core.py", "from longburn.kernels.attend import run\nfrom ..rope import RotaryEncoding"),
        ("kernels/attend/triton.py", "def launch():\n    import triton"),
        ("kernels/linear.py", "from longburn.kernels.triton import unavailable"),
        ("kernels/triton/decode.py", "import triton\nfrom longburn.kernels.triton.tiles import relative"),
        ("interact/env.py", "import gymnasium"),
        ("generation/loop.py", "from longburn.sampling import sample\nfrom longburn.text import Tokenizer"),
        ("cli/main.py", "import json\nimport typer\nfrom longburn.cli.options import X\ndef f():\n    import torch"),
        ("models/llama.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    ],
)
def test_the_check_lets_pass(module: str, code: str) -> None:
    assert list(violations(SOURCE / module, ast.parse(code))) == []
