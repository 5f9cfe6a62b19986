"""The documentation keeps its word: its Python runs, and so does every example.

The ```python blocks of one page run in order and share their names, as a reader would type them. A block that cannot
run everywhere stands below a line `<!-- not run: the reason -->`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

BLOCK = re.compile(
    r"(?P<not_run>^[ ]*<!-- not run: \S.* -->\n+)?"
    r"^(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[str]:
    """The runnable Python blocks of a page, each moved down to its own line numbers."""
    found = []
    for match in BLOCK.finditer(text):
        if match["not_run"]:
            continue
        lines = match["code"].splitlines(keepends=True)
        code = "".join(line.removeprefix(match["indent"]) for line in lines)
        found.append("\n" * text.count("\n", 0, match.start("code")) + code)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": f"docs:{page.stem}"}
    for code in blocks(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)  # the failing line of the page shows in the traceback


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    # Run away from the repository and without a terminal, as someone who only has the file would.
    result = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip(), f"{example.name} prints nothing: an example shows what it does"


def test_blocks_are_found_with_their_lines() -> None:
    page = "# T\n\n```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nb = 2\n```\n"
    page += "- item\n\n  ```python\n  if a:\n      c = 3\n  ```\n\n```pycon\n>>> no\n```\n"
    assert blocks(page) == ["\n\n\na = 1\n", "\n" * 13 + "if a:\n    c = 3\n"]
