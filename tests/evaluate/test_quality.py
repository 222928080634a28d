"""Quality on test text against transformers' own loss."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.evaluate import evaluate
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run


@pytest.mark.parametrize("blocks", [None, ("kv1+w32", "none+none", "kv4+none", "linear+w64")])
def test_quality_is_that_of_whole_forwards_whether_or_not_models_fit_in_memory(
    blocks: tuple[str, ...] | None,
    tmp_path: Path,
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_library: Library,
) -> None:
    child = realise(pico_run, pico_parent, pico_library, blocks) if blocks else None
    quality = evaluate(pico_run, pico_parent, child, pico_data, "model")
    (sequences,) = pico_data.batches("test", 10_000, pico_run.recipe.evaluate.tokens)
    targets_N, parent = sequences[:, 1:].flatten(), AutoModelForCausalLM.from_pretrained(pico_parent.path)
    model = parent if child is None else child.load()
    with torch.no_grad():
        parent_NV, logits_NV = (each(sequences[:, :-1]).logits.flatten(0, 1) for each in (parent, model))
    logps_NV = [log_softmax(each, -1) for each in (logits_NV, parent_NV)]
    assert quality["test_loss"] == pytest.approx(float(cross_entropy(logits_NV, targets_N)), rel=1e-4)
    assert quality["top1"] == pytest.approx(float((logits_NV.argmax(-1) == targets_N).float().mean()), abs=1e-3)
    kl = float(kl_div(*logps_NV, log_target=True, reduction="batchmean"))
    assert quality["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    agreement = float((logits_NV.argmax(-1) == parent_NV.argmax(-1)).float().mean())
    assert quality["top1_agreement"] == pytest.approx(agreement, abs=1e-3)

    small = pico_run.recipe.execution.model_copy(update={"memory": 1})
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"execution": small}))
    assert evaluate(run, pico_parent, child, pico_data, "model") == quality
    assert not list(tmp_path.rglob("activations*"))
