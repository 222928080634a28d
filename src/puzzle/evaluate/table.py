"""One row of the final comparison."""

from collections.abc import Mapping
from dataclasses import asdict

from puzzle.artefacts import Totals
from puzzle.evaluate.quality import Quality


def table_row(quality: Quality, predicted: Totals, measured: Mapping[str, float]) -> dict[str, float]:
    """Quality on test text, sizes, and speed, predicted and measured always together (docs/numbers.md)."""
    totals = predicted.as_dict()
    row = asdict(quality) | {name: totals[name] for name in ("params", "weight_bytes", "kv_bytes", "memory_bytes")}
    for name, short in (("throughput_tok_s", "tok_s"), ("prefill_ms", "prefill_ms"), ("decode_ms", "decode_ms")):
        row[f"predicted_{short}"] = totals[name]
        row[f"measured_{short}"] = measured[name]
    return row
