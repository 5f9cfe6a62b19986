"""An attention bias as a self-contained HTML page and as a PNG; `longburn.bias.picture` has the numbers."""

import html
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from longburn.bias.picture import BiasPicture

PAGE_NUMBERS = 200_000  # biases and key positions in one page: some 1.5 MB
GAP = 3  # empty columns between kept sink tokens and the other keys
DRAWN_HEADS = 4  # of which the PNG shows maps
MAP_COLUMNS = 4096  # of a map, at most


def page(picture: "BiasPicture") -> str:
    """The picture as one HTML page with a slider over time. It asks the network for nothing.

    Raises:
        ValueError: more than `PAGE_NUMBERS` numbers.
    """
    if picture.numbers > PAGE_NUMBERS:
        raise ValueError(
            f"bias page: {picture.numbers:,} numbers, wanted at most {PAGE_NUMBERS:,}; record fewer queries or heads"
        )
    data = picture.as_dict()
    data["bound"] = (
        f"This page holds {picture.numbers:,} numbers (at most {PAGE_NUMBERS:,}); biases are rounded to 4 significant "
        "digits. It loads nothing from elsewhere."
    )
    # "<" could end the script element, or begin a comment in it, from within a string.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("longburn.cli").joinpath("data/bias_view.html").read_text(encoding="utf-8")
    head, body = template.replace("@TITLE@", html.escape(picture.title)).split("@DATA@")
    return head + text + body


def need_matplotlib() -> None:
    """Raises ImportError, with what to install, unless pictures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a PNG needs matplotlib: pip install 'longburn[plot]', or ask for --html alone") from error


def draw(picture: "BiasPicture", path: Path) -> None:
    """The picture as a PNG: the newest query's curves, and maps of up to four heads by key position and by slot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    columns = Columns(picture)
    first, last = columns.key_span
    shown = _evenly(picture.heads, DRAWN_HEADS)
    figure = Figure(figsize=(3.4 * max(3, len(shown)), 10.5), layout="constrained")
    figure.suptitle("\n".join([picture.title, *picture.notes]), fontsize=9, x=0.01, ha="left")
    grid = figure.add_gridspec(3, len(shown), height_ratios=(1.1, 1, 1))
    _draw_curves(figure.add_subplot(grid[0, :]), picture, columns)
    for place, head in enumerate(shown):
        low, high = near_range(picture, head)
        options: dict[str, Any] = {"norm": Normalize(low, high), "cmap": "viridis", "aspect": "auto"}
        options |= {"interpolation": "nearest"}
        by_key, by_slot = figure.add_subplot(grid[1, place]), figure.add_subplot(grid[2, place])
        bottom, top = len(picture.rows) - 0.5, -0.5
        image = _map(picture, head, last - first + 1, lambda _, key: key - first)
        by_key.imshow(image.numpy(), extent=(first - 0.5, last + 0.5, bottom, top), **options)
        by_key.set_title(f"head {head + 1}", fontsize=10)
        by_key.set_xlabel("position of the key")
        image = _map(picture, head, columns.size, columns.of)
        drawn = by_slot.imshow(image.numpy(), extent=(-0.5, columns.size - 0.5, bottom, top), **options)
        _label_slots(by_slot, columns)
        for axes in (by_key, by_slot):
            _label_queries(axes, picture, named=place == 0)
        # matplotlib's arrow at the end of a colour bar: sink tokens beyond the scale.
        below = any(float(row.bias[head].min()) < low for row in picture.rows)
        above = any(float(row.bias[head].max()) > high for row in picture.rows)
        extend = "both" if below and above else "min" if below else "max" if above else "neither"
        figure.colorbar(drawn, ax=[by_key, by_slot], location="bottom", shrink=0.9, extend=extend)
    figure.savefig(path, dpi=110, format="png")


class Columns:
    """Where keys are drawn when slots stand in order of position: sink tokens, a gap, the others by distance.

    Attributes:
        size: columns in all.
        key_span: lowest and highest key position of all rows.
        distances: of keys that are no sink tokens, least and greatest.
    """

    def __init__(self, picture: "BiasPicture") -> None:
        self.sinks = picture.sink_tokens
        far, near = [], []
        for row in picture.rows:
            away = (row.position - row.keys)[row.keys >= self.sinks]
            if away.numel():
                far.append(int(away.max()))
                near.append(int(away.min()))
        self.distances = (min(near, default=0), max(far, default=0))
        keys = [row.keys for row in picture.rows if row.keys.numel()]
        self.key_span = (min(int(k[0]) for k in keys), max(int(k[-1]) for k in keys))
        self.lead = self.sinks + GAP if self.sinks else 0
        self.size = self.lead + self.distances[1] - self.distances[0] + 1

    def of(self, position: int, key: "Tensor") -> "Tensor":
        """Columns of keys `[n]` as the query at `position` sees them."""
        return (self.lead + self.distances[1] - (position - key)).where(key >= self.sinks, key)


def near_range(picture: "BiasPicture", head: int | None = None) -> tuple[float, float]:
    """Lowest and highest bias of keys that are no sink tokens, of one head or of all.

    Sink tokens stand ever farther away: with them the range would squeeze everything else.
    """
    heads = slice(None) if head is None else slice(head, head + 1)
    near = [row.bias[heads][:, row.keys >= picture.sink_tokens] for row in picture.rows]
    values = [part for part in near if part.numel()] or [row.bias[heads] for row in picture.rows]
    low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
    return (low, high) if low < high else (low - 1, high + 1)


def _evenly(count: int, most: int) -> Sequence[int]:
    """At most so many of `0 .. count - 1`, the first and the last among them."""
    return range(count) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _map(picture: "BiasPicture", head: int, span: int, column: "Callable[[int, Tensor], Tensor]") -> "Tensor":
    """Rows of queries over the columns `0 .. span - 1`, thinned to `MAP_COLUMNS`; NaN where there is no key."""
    import torch

    size = min(span, MAP_COLUMNS)
    image = torch.full((len(picture.rows), size), float("nan"))
    for line, row in zip(image, picture.rows, strict=True):
        line[column(row.position, row.keys) * size // span] = row.bias[head]
    return image


def _draw_curves(axes: Any, picture: "BiasPicture", columns: Columns) -> None:
    from matplotlib import colormaps

    row = picture.rows[-1]
    low, high = near_range(picture)
    margin = 0.04 * (high - low)
    x, near = columns.of(row.position, row.keys), row.keys >= picture.sink_tokens
    for head, line in enumerate(row.bias):
        color = colormaps["viridis"](0.85 * head / max(1, picture.heads - 1))
        axes.plot(x[near].numpy(), line[near].numpy(), color=color, linewidth=1.5, label=f"head {head + 1}")
        axes.plot(
            x[~near].numpy(), line[~near].clamp(low - margin, high + margin).numpy(), ".", color=color, clip_on=False
        )
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(-0.5, columns.size - 0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel("bias")
    beyond = "; sink tokens beyond the scale stand at its edge" if picture.sink_tokens else ""
    axes.set_title(f"what the query at position {row.position} adds to every score{beyond}", fontsize=10)
    axes.legend(ncols=min(8, picture.heads), fontsize=8, loc="best", framealpha=0.6)
    _label_slots(axes, columns)


def _label_slots(axes: Any, columns: Columns) -> None:
    from matplotlib.ticker import MaxNLocator

    near, far = columns.distances
    ticks = [int(d) for d in MaxNLocator(5, integer=True).tick_values(near, far) if near <= d <= far]
    places, names = [float(columns.lead + far - d) for d in ticks], [str(d) for d in ticks]
    if columns.sinks:
        places, names = [(columns.sinks - 1) / 2, *places], ["sinks", *names]
    axes.set_xticks(places, names)
    axes.set_xlabel("distance from query to key" if not columns.sinks else "kept sink tokens | distance to the key")


def _label_queries(axes: Any, picture: "BiasPicture", *, named: bool) -> None:
    places = _evenly(len(picture.rows), 6)
    axes.set_yticks(places, [str(picture.rows[i].position) for i in places])
    if named:
        axes.set_ylabel("position of the query")
