"""Quality on test text against transformers' own loss."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.evaluate import evaluate
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run


def test_parent_row(pico_run: Run, pico_parent: Parent, pico_data: TokenData) -> None:
    quality = evaluate(pico_run, pico_parent, None, pico_data, "parent")
    model = AutoModelForCausalLM.from_pretrained(pico_parent.path)
    (sequences,) = pico_data.batches("test", 10_000, pico_run.recipe.evaluate.tokens)
    with torch.no_grad():
        logits = model(sequences[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert quality.test_loss == pytest.approx(float(loss), rel=1e-4)
    assert quality.top1 == pytest.approx(float((logits.argmax(-1) == sequences[:, 1:]).float().mean()), abs=1e-3)
    assert quality.kl == 0.0
    assert quality.top1_agreement == 1.0


def test_neither_parent_nor_child_needs_to_fit_in_memory(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> None:
    child = realise(pico_run, pico_parent, pico_library, ("kv1+w32", "none+none", "kv4+none", "linear+w64"))
    small = pico_run.recipe.execution.model_copy(update={"memory": 1})
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"execution": small}))
    expected = evaluate(pico_run, pico_parent, child, pico_data, "child")
    assert evaluate(run, pico_parent, child, pico_data, "child") == expected
    assert not list(tmp_path.rglob("activations*"))


def test_child_row(pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library) -> None:
    child = realise(pico_run, pico_parent, pico_library, ("none+none",) * 4)
    quality = evaluate(pico_run, pico_parent, child, pico_data, "child")
    assert quality.kl > 0.1
    assert quality.top1_agreement < 1.0
    assert math.isfinite(quality.test_loss)
