"""Numbers as text, for people: a few significant digits, the unit beside the number."""

import math

MISSING = "-"


def significant(value: float, digits: int = 3) -> str:
    """`value` rounded to `digits` significant digits, never in exponent form above 1e-5: `0.0123`, `4,890`."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:,.{max(0, decimals)}f}"


def percent(value: float) -> str:
    return f"{significant(100 * value)} %" if math.isfinite(value) else MISSING


def signed_percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def ratio(value: float) -> str:
    """A multiple as recipes write it: `1.97x`."""
    return f"{significant(value)}x" if math.isfinite(value) else MISSING


def plain(value: float) -> str:
    """A number whose unit stands elsewhere, or that has none."""
    return significant(value, 4)


def tokens_per_second(value: float) -> str:
    return f"{significant(value, 4)} tok/s"


def milliseconds(value: float) -> str:
    return f"{significant(value)} ms"


def count(value: float) -> str:
    return _scaled(value, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3})


def size(value: float) -> str:
    """Bytes in decimal units, as recipes read them."""
    return _scaled(value, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}, unscaled="B")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float, units: dict[str, float], unscaled: str = "") -> str:
    for unit, scale in units.items():
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{significant(value)} {unscaled}".rstrip()
