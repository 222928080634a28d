"""Amounts as people write them (`24GB`, `2x`, `80%`, `200ms`, `1.5M`) and as they like to read them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_AMOUNT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/%]*)\s*")
_RELATIVE = {"x": 1.0, "%": 0.01}


@dataclass(frozen=True, eq=False)
class Unit:
    """The units of one kind of amount, by their worth in its base unit: bytes, ms, tok/s or 1."""

    worth: Mapping[str, float]
    written: tuple[str, ...]
    """Those that values are written in, the largest first."""
    example: str

    def parse(self, text: object) -> tuple[float, str, str]:
        """The value in the base unit, and the number and the unit as they were written."""
        if isinstance(text, int | float | str) and not isinstance(text, bool):
            match = _AMOUNT.fullmatch(str(text))
            if match is not None and match[2] in self.worth:
                number = float(match[1].replace("_", ""))
                if math.isfinite(value := number * self.worth[match[2]]):
                    return value, f"{number:.12g}", match[2]
        raise ValueError(f"expected a number such as {self.example}, found {text!r}")

    def scaled(self, value: float) -> tuple[float, str]:
        """`value` in the largest written unit that leaves at least 1, and that unit."""
        unit = next((unit for unit in self.written if abs(value) >= self.worth[unit]), self.written[-1])
        return value / self.worth[unit], unit

    def text(self, value: float, digits: int = 3) -> str:
        """For people: `24.0 GB`, `8.03 B`; `-` if not finite."""
        if not math.isfinite(value):
            return "-"
        number, unit = self.scaled(value)
        return f"{format_number(number, digits)} {unit}".rstrip()


_DECIMAL = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BYTES = Unit(_DECIMAL | _BINARY, ("TB", "GB", "MB", "kB", "B"), "24GB")
MILLISECONDS = Unit({"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6}, ("ms",), "200ms")
SPEED = Unit({"tok/s": 1}, ("tok/s",), "5500 tok/s")
_WORTH = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
COUNT = Unit(_WORTH, ("T", "B", "M", "k", ""), "7B")
NUMBER = Unit({"": 1}, ("",), "0.35")


@dataclass(frozen=True)
class Amount:
    """An absolute value in the base unit, or a multiple of the parent's own."""

    value: float
    relative: bool
    text: str

    def resolve(self, parent_value: float) -> float:
        """The absolute value, given the parent's."""
        return self.value * parent_value if self.relative else self.value


def amount(unit: Unit, *, relative: bool) -> Any:
    """The pydantic type of a setting with such an amount; with `relative`, `2x` and `80%` of the parent's as well."""
    if relative:
        unit = Unit({**unit.worth, **_RELATIVE}, unit.written, f"{unit.example}, or 2x or 80% of the parent's")

    def parse(text: object) -> Amount:
        if isinstance(text, Amount):
            return text
        value, number, name = unit.parse(text)
        if value <= 0:
            raise ValueError(f"expected more than nothing, such as {unit.example}, found {text!r}")
        return Amount(value, name in _RELATIVE, number + name)

    return Annotated[Amount, BeforeValidator(parse), PlainSerializer(lambda amount: amount.text)]


def _parse_count(text: object) -> int:
    value, *_ = Unit(_WORTH, (), "512k or 1.5M").parse(text)
    if not math.isclose(value, round(value), abs_tol=0.0):
        raise ValueError(f"expected a whole number such as 512k or 1.5M, found {text!r}")
    return round(value)


Count = Annotated[int, BeforeValidator(_parse_count)]
"""`4096`, `512k`, `1.5M`, `2G`."""
Size = Annotated[int, BeforeValidator(lambda text: round(BYTES.parse(text)[0])), PlainSerializer("{}B".format)]
"""`24GB`, in bytes."""
Fraction = Annotated[float, BeforeValidator(lambda text: Unit({"%": 0.01, "": 1.0}, (), "80% or 0.8").parse(text)[0])]
"""`80%` or `0.8`."""


def format_number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits: `0.0123`, `4,890`; in exponent form below 1e-5; `-` if not finite."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def format_percent(fraction: float) -> str:
    """`91.3 %`."""
    return f"{format_number(100 * fraction)} %" if math.isfinite(fraction) else "-"


def format_ratio(value: float) -> str:
    """A multiple as recipes write it: `1.97x`."""
    return f"{format_number(value)}x" if math.isfinite(value) else "-"


format_bytes = BYTES.text
"""`24.0 GB`, in powers of 1000 as disks and engines are sold."""


def format_seconds(seconds: float) -> str:
    """`9 s`, `3 min 20 s`, `2 h 5 min`, `12 days`, `1.2 years`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours} h {minutes} min"
    days = hours / 24
    return f"{days:.0f} days" if days < 365 else f"{days / 365:,.1f} years"
