"""Quantities as people write them: `24GB`, `2x`, `80%`, `200ms`, `1.5M`."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_NUMBER = r"\s*([0-9]+(?:[._0-9]*)(?:e[+-]?[0-9]+)?)\s*"
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
}
_BYTES |= {"TiB": 2**40}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6}
_COUNTS: dict[str, float] = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SPEEDS: dict[str, float] = {"": 1, "tok/s": 1}


@dataclass(frozen=True)
class Amount:
    """An absolute value in base units (bytes, ms, tok/s, count), or a multiple of the parent's own."""

    value: float
    relative: bool
    text: str

    def resolve(self, parent_value: float) -> float:
        """The absolute value, given the parent's."""
        return self.value * parent_value if self.relative else self.value


def _parse(text: object, units: dict[str, float], example: str) -> float:
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        raise ValueError(f"expected a number such as {example}, found {text!r}")
    match = re.fullmatch(_NUMBER + "([A-Za-z/%]*)", str(text))
    if match is None or match[2] not in units:
        raise ValueError(f"expected a number such as {example}, found {text!r}")
    return float(match[1].replace("_", "")) * units[match[2]]


def parse_count(text: object) -> int:
    """`4096`, `512k`, `1.5M`, `2G` to a whole number."""
    return round(_parse(text, _COUNTS, "512k or 1.5M"))


def parse_fraction(text: object) -> float:
    """`80%` or `0.8` to 0.8."""
    return _parse(text, {"%": 0.01, "": 1.0}, "80% or 0.8")


def _parse_amount(units: dict[str, float], example: str) -> Any:
    def parse(text: object) -> Amount:
        if isinstance(text, Amount):
            return text
        if match := re.fullmatch(_NUMBER + "(x|%)", str(text)):
            return Amount(float(match[1]) * (0.01 if match[2] == "%" else 1.0), True, str(text))
        value = _parse(text, units, f"{example}, or 2x or 80% of the parent's")
        return Amount(value, False, str(text))

    return parse


def _amount_type(units: dict[str, float], example: str) -> Any:
    return Annotated[
        Amount, BeforeValidator(_parse_amount(units, example)), PlainSerializer(lambda amount: amount.text)
    ]


Bytes = _amount_type(_BYTES, "24GB")
Milliseconds = _amount_type(_MILLISECONDS, "200ms")
Speed = _amount_type(_SPEEDS, "5500")
CountAmount = _amount_type(_COUNTS, "7B")
Count = Annotated[int, BeforeValidator(parse_count)]
Fraction = Annotated[float, BeforeValidator(parse_fraction)]
