"""A table of results, for the terminal and for the documentation."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output, wide enough for every table where it is not a terminal."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 180)


@dataclass(frozen=True)
class Sheet:
    """Rows of finished text under a title. The first `labels` columns name the row, the others hold figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left")
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < self.labels else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = ["---" if column < self.labels else "---:" for column in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join(["**" + self.title + "**", "", *("| " + " | ".join(line) + " |" for line in lines)])
