"""Quantities as people write them (`24GB`, `2x`, `80%`, `200ms`, `1.5M`) and as they like to read them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_NUMBER = r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*"
_BYTES: dict[str, float] = {
    "B": 1,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
BYTE_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6}
_COUNTS: dict[str, float] = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SPEEDS: dict[str, float] = {"": 1, "tok/s": 1}
_RELATIVE = {"x": 1.0, "%": 0.01}


@dataclass(frozen=True)
class Amount:
    """An absolute value in base units (bytes, ms, tok/s, count), or a multiple of the parent's own."""

    value: float
    relative: bool
    text: str

    def resolve(self, parent_value: float) -> float:
        """The absolute value, given the parent's."""
        return self.value * parent_value if self.relative else self.value


def _parse(text: object, units: dict[str, float], example: str) -> tuple[float, str, str]:
    """The number as it was written, its unit, and the two multiplied."""
    if not isinstance(text, bool) and isinstance(text, int | float | str):
        match = re.fullmatch(_NUMBER + r"([A-Za-z/%]*)\s*", str(text))
        if match is not None and match[2] in units:
            number = float(match[1].replace("_", ""))
            value = number * units[match[2]]
            if math.isfinite(value):
                return value, f"{number:.12g}", match[2]
    raise ValueError(f"expected a number such as {example}, found {text!r}")


def parse_count(text: object) -> int:
    """`4096`, `512k`, `1.5M`, `2G` to a whole number."""
    value = _parse(text, _COUNTS, "512k or 1.5M")[0]
    if not math.isclose(value, round(value), abs_tol=0.0):
        raise ValueError(f"expected a whole number such as 512k or 1.5M, found {text!r}")
    return round(value)


def parse_size(text: object) -> int:
    """`24GB` to bytes."""
    return round(_parse(text, _BYTES, "24GB")[0])


def parse_fraction(text: object) -> float:
    """`80%` or `0.8` to 0.8."""
    return _parse(text, {"%": 0.01, "": 1.0}, "80% or 0.8")[0]


def _parse_amount(units: dict[str, float], example: str, *, relative: bool) -> Any:
    units, example = (units | _RELATIVE, f"{example}, or 2x or 80% of the parent's") if relative else (units, example)

    def parse(text: object) -> Amount:
        if isinstance(text, Amount):
            return text
        value, number, unit = _parse(text, units, example)
        if value <= 0:
            raise ValueError(f"expected more than nothing, such as {example}, found {text!r}")
        return Amount(value, unit in _RELATIVE, number + unit)

    return parse


def _amount_type(units: dict[str, float], example: str, *, relative: bool = True) -> Any:
    parse = _parse_amount(units, example, relative=relative)
    return Annotated[Amount, BeforeValidator(parse), PlainSerializer(lambda amount: amount.text)]


Bytes = _amount_type(_BYTES, "24GB")
Milliseconds = _amount_type(_MILLISECONDS, "200ms")
Speed = _amount_type(_SPEEDS, "5500")
CountAmount = _amount_type(_COUNTS, "7B")
Score = _amount_type({"": 1}, "0.35", relative=False)
Count = Annotated[int, BeforeValidator(parse_count)]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(lambda count: f"{count}B")]
Fraction = Annotated[float, BeforeValidator(parse_fraction)]


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


def format_scaled(value: float, scales: Sequence[tuple[float, str]], digits: int = 3) -> str:
    """In the first of the units, the largest first, that leaves at least 1: `8.03 B` parameters; `-` if not finite."""
    if not math.isfinite(value):
        return "-"
    scale, unit = next((item for item in scales if abs(value) >= item[0]), scales[-1])
    return f"{format_number(value / scale, digits)} {unit}".rstrip()


def format_bytes(count: float) -> str:
    """`24.0 GB`, in powers of 1000 as disks and engines are sold."""
    return format_scaled(count, BYTE_SCALES)


def format_seconds(seconds: float) -> str:
    """`9 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
