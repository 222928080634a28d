"""The experiment on SmolLM2, `benchmarks/smollm2.py`, on a tiny parent and a calculated engine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_task

from puzzle.recipe import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_recipe: Recipe) -> Any:
    """The benchmark as a module, with a form of its own: pico sizes, on a machine that is slow enough to tell them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import smollm2

    sections = {
        name: pico_recipe.model_dump(mode="json")[name] for name in ("calibration", "library", "score", "distil")
    }
    data = pico_recipe.data.model_dump(mode="json", exclude={"source"})
    sheet = {"peak_tflops": {"bfloat16": 1e-3}, "memory_gb_s": 1e-2, "memory_gb": 1, "layer_us": 0}
    (tmp_path / "slow.yaml").write_text(json.dumps({"slow": sheet}))
    scenario = {
        "engine": "roofline",
        "machine": str(tmp_path / "slow.yaml"),
        "batch_sizes": [64],
        "prompt_tokens": 16,
        "generated_tokens": 8,
    }
    form = {"children": (("1.3x", 0),), "data": data | {"sampled_tokens": 500}, **sections, "scenario": scenario}
    monkeypatch.setitem(smollm2.FORMS, "tiny", form | {"evaluate": {"tokens": 512}, "correct": {"tokens": 0}})
    return smollm2


def test_every_row_is_made_once_with_its_command_and_versions(
    smollm2: Any, tmp_path: Path, pico_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "tiny",
        str(tmp_path / "out"),
        "--parent",
        pico_recipe.parent,
        "--text",
        *pico_recipe.data.source,
        "parent",
    ]
    asked += ["--tasks", str(write_task(tmp_path, "numbers"))]
    smollm2.main([*asked, "--plan"])
    assert "5 children on " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    smollm2.main(asked)
    text = (tmp_path / "out" / "rows.jsonl").read_text()
    rows = {row["model"]: row for row in map(json.loads, text.splitlines())}
    assert rows.keys() == {"parent", *smollm2.METHODS}
    assert "error" not in rows["puzzle"]
    assert rows["parent"]["kl"] == 0
    for row in rows.values():
        assert row["command"] == " ".join(sys.argv)
        assert row["tokens"] == 8192
        assert row["model"] == "parent" or row.get("measured", 1.3) >= 1.29
        assert "error" in row or "numbers" in row["tasks"]
    shown = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {model} |" in shown for model in rows)
    lines = text.splitlines(keepends=True)
    (tmp_path / "out" / "rows.jsonl").write_text("".join(lines[:3]))
    smollm2.main(asked)
    assert (tmp_path / "out" / "rows.jsonl").read_text() == text
