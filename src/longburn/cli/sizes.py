"""Amounts of memory, as they are typed and as they are shown."""

import re

import typer

_UNITS = {"": 1, **{f"{letter}B": 1000**n for n, letter in enumerate(("", "k", "M", "G", "T"))}}
_UNITS |= {f"{letter}iB": 1024**n for n, letter in enumerate(("K", "M", "G", "T"), start=1)}


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "5 GB" or "4096": decimal and binary units, upper or lower case.

    Raises:
        typer.BadParameter: anything else, or nothing at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factors = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if (
        found is None
        or found[2].lower() not in factors
        or (size := int(float(found[1]) * factors[found[2].lower()])) < 1
    ):
        raise typer.BadParameter(f"{text!r}: wanted an amount of memory such as 80GiB, 5GB or 500MB")
    return size


def show_size(size: int) -> str:
    """Binary units, three digits or so: "12.8 GiB"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.2f} {unit}"
