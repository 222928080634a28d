"""Quantities as people write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from puzzle import units
from puzzle.units import (
    BYTES,
    MILLISECONDS,
    SPEED,
    Amount,
    Count,
    Fraction,
    Unit,
    amount,
    format_number,
    format_seconds,
)

SIZES: TypeAdapter[Amount] = TypeAdapter(amount(BYTES, relative=True))


@pytest.mark.parametrize(
    ("text", "count"),
    [(4096, 4096), ("512k", 512_000), ("1.1k", 1100), ("1_000", 1000), (2e3, 2000), (" 7 B ", 7 * 10**9)],
)
def test_counts(text: object, count: int) -> None:
    assert TypeAdapter(Count).validate_python(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "-1", "1..2", "1 2", "1KiB", "nan", "inf", "1e999", True, None, [1], "0.1234k"]
)
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(ValidationError, match="expected a"):
        TypeAdapter(Count).validate_python(text)


@pytest.mark.parametrize(("text", "fraction"), [("80%", 0.8), ("0.8", 0.8), (0.8, 0.8), (1, 1.0), ("2.5 %", 0.025)])
def test_fractions(text: object, fraction: float) -> None:
    assert TypeAdapter(Fraction).validate_python(text) == pytest.approx(fraction, rel=1e-15)


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [(BYTES, "24GB", 24e9), (BYTES, "1.5 GiB", 1.5 * 2**30), (MILLISECONDS, "0.2s", 200), (SPEED, "5.5e3 tok/s", 5500)],
)
def test_absolute_amounts(unit: Unit, text: object, value: float) -> None:
    found = TypeAdapter(amount(unit, relative=True)).validate_python(text)
    assert not found.relative
    assert found.value == pytest.approx(value)
    assert found.resolve(3.0) == found.value


@pytest.mark.parametrize(("text", "share"), [("2x", 2.0), ("80%", 0.8), ("0.5 x", 0.5)])
def test_relative_amounts_refer_to_the_parent(text: str, share: float) -> None:
    found = SIZES.validate_python(text)
    assert found.relative
    assert found.resolve(10.0) == pytest.approx(10 * share)


@pytest.mark.parametrize("text", ["0", "0x", "0GB", "24", "24 MS", "2xx", "-2x", "GB", "x", None, True])
def test_what_is_no_amount_of_bytes(text: object) -> None:
    with pytest.raises(ValidationError, match="24GB"):
        SIZES.validate_python(text)


@given(st.floats(min_value=1e-6, max_value=1e12), st.sampled_from(["GB", "MiB", "x", "%"]))
def test_an_amount_survives_being_written_down(number: float, unit: str) -> None:
    first = SIZES.validate_python(f"{number!r}{unit}")
    again = SIZES.validate_python(SIZES.dump_python(first))
    assert again.relative == first.relative
    assert again.value == pytest.approx(first.value, rel=1e-11)


def test_one_amount_written_in_two_ways_is_kept_as_one_text() -> None:
    texts = {SIZES.validate_python(text).text for text in ("2x", "2.0x", " 2 x", "2.00x")}
    assert texts == {"2x"}


@given(st.floats(1e-12, 1e15), st.integers(2, 6))
def test_numbers_keep_their_significant_digits(value: float, digits: int) -> None:
    shown = float(format_number(value, digits).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.5001 * 10 ** (1 - digits))


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("number", 999.6, "1,000"),
        ("number", math.inf, "-"),
        ("bytes", 0, "0 B"),
        ("bytes", 7.873e6, "7.87 MB"),
        ("bytes", 3.2e15, "3,200 TB"),
        ("percent", 0.913, "91.3 %"),
        ("ratio", 1.969, "1.97x"),
        ("ratio", math.nan, "-"),
        ("seconds", 59.4, "59 s"),
        ("seconds", 59.6, "1 min 0 s"),
        ("seconds", 7500, "2 h 5 min"),
    ],
)
def test_numbers_read_well(kind: str, value: float, wanted: str) -> None:
    assert getattr(units, f"format_{kind}")(value) == wanted


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.3, "0 s"), (9.4, "9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
        *[(86400 * 5, "5 days"), (9077 * 3600, "1.0 years")],
    ],
)
def test_times_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
