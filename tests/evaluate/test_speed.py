"""Measured speed of whole models, here by calculation: one row a model, each architecture timed once a batch size."""

from pathlib import Path

import pytest
from tests.conftest import pico_puzzle

from puzzle.artefacts import CostTable, Scenario
from puzzle.child import Child
from puzzle.costs import time_models
from puzzle.evaluate import measure_speed
from puzzle.modeling import save_checkpoint
from puzzle.parents import Parent, open_parent
from puzzle.runs import Run

SCENARIO = Scenario(engine="roofline", device="h200", dtype="bfloat16", prompt_tokens=64, generated_tokens=9)


def test_rows_say_what_was_measured(pico_run: Run, tmp_path: Path) -> None:
    models = dict[str, tuple[Parent | Child, int]]()
    for name, blocks in {
        "parent": ("kv4+w48",) * 2,
        "child_before": ("kv1+w16",) * 2,
        "child": ("kv1+w16",) * 2,
    }.items():
        save_checkpoint(pico_puzzle(*blocks), tmp_path / name, extra_files_from=None)
        models[name] = open_parent(str(tmp_path / name)), 8 if name == "parent" else 4
    costs = CostTable(scenario=SCENARIO, batch_sizes=(4, 8), rows=())
    rows = measure_speed(pico_run, models, costs)
    assert rows["child"] == rows["child_before"]
    (parent, *_), (child, *_) = time_models([(models["parent"][0].path, 8), (models["child"][0].path, 4)], SCENARIO, 1)
    for sample, row, size in ((parent, rows["parent"], 8), (child, rows["child"], 4)):
        request_ms = sample.prefill_ms + 8 * sample.decode_ms
        assert (row["prefill_ms"], row["decode_ms"]) == pytest.approx((sample.prefill_ms, sample.decode_ms))
        assert row["request_ms"] == pytest.approx(request_ms)
        assert row["throughput_tok_s"] == pytest.approx(1e3 * size * 9 / request_ms)
    assert rows["child"]["request_ms"] < rows["parent"]["request_ms"]
    assert measure_speed(pico_run, models, costs) == rows
