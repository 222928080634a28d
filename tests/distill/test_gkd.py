"""GKD brings a damaged child closer to its parent, by the steps of an independent loop, also after a kill."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Waits
from tests.library.conftest import CutData, Killed
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax
from transformers import LlamaForCausalLM

from puzzle.child import Child, realise
from puzzle.data import TokenData
from puzzle.distill import distil, distillation_curve
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

BLOCKS = ("kv1+w8", "kv4+w64", "none+w64", "kv2+linear")

Distil = Callable[..., Child]


@pytest.fixture(scope="session")
def child(pico_run: Run, pico_parent: Parent, pico_library: Library) -> Child:
    return realise(pico_run, pico_parent, pico_library, BLOCKS)


@pytest.fixture
def distilled(pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, tmp_path: Path) -> Distil:
    """Distil the child with other settings, in a run folder of its own."""

    def run(
        folder: str = "run", execution: dict[str, Any] | None = None, data: TokenData = pico_data, **settings: Any
    ) -> Child:
        (tmp_path / folder).mkdir(exist_ok=True)
        changed = DistilSettings.model_validate(pico_run.recipe.distil.model_dump() | {"tokens": 3072} | settings)
        where = pico_run.recipe.execution.model_copy(update=execution or {})
        recipe = pico_run.recipe.model_copy(update={"distil": changed, "execution": where})
        own = replace(pico_run, path=tmp_path / folder, recipe=recipe, used=[])
        return distil(own, pico_parent, child, data)

    return run


def weights(child: Child) -> dict[str, Tensor]:
    return load_file(child.path / "model.safetensors")


@pytest.mark.parametrize("settings", [{"accumulate": 4}, {"teacher_cache": 8, "documents": False}], ids=str)
def test_distillation_lowers_the_held_out_kl(settings: dict[str, Any], distilled: Distil, child: Child) -> None:
    found = distilled(tokens=8192, **settings)
    curve = distillation_curve(found)
    assert curve[0]["step"] == 0
    assert curve[-1]["tokens"] >= 8192
    assert curve[-1]["validation_kl"] < 0.9 * curve[0]["validation_kl"]
    assert found.architecture == child.architecture
    assert found.address != child.address
    assert not list(found.path.parent.glob("training*"))


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "lm_weight": 0.5, "weight_decay": 0.1}], ids=str)
def test_training_equals_an_independent_loop(
    settings: dict[str, Any], distilled: Distil, child: Child, pico_parent: Parent, pico_data: TokenData, pico_run: Run
) -> None:
    """Of plain logits, by torch's own functions and a step of AdamW that is not fused; the parent is transformers'."""
    steps, length = 6, pico_data.sequence_length
    found = distilled(tokens=steps * 8 * length, documents=False, execution={"checkpointing": True}, **settings)
    model = PuzzleForCausalLM.from_pretrained(child.path, dtype=torch.float32)
    parent = LlamaForCausalLM.from_pretrained(pico_parent.path, dtype=torch.float32)
    matrices, vectors = (
        [value for value in model.parameters() if (value.ndim > 1) is whole] for whole in (True, False)
    )
    decay = settings.get("weight_decay", 0.0)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)

    def losses(sequences_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = [each(sequences_BT[:, :-1], output_hidden_states=True, use_cache=False) for each in (model, parent)]
        logq, logp = (log_softmax(output.logits, -1) for output in outputs)
        kl = kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()
        # transformers gives the last layer's output after the final norm: before it, from hooks.
        cosine = torch.stack(
            [1 - cosine_similarity(own, other, dim=-1).mean() for own, other in zip(*entered, strict=True)]
        ).mean()
        return kl, cosine, cross_entropy(outputs[0].logits.flatten(0, 1), sequences_BT[:, 1:].flatten())

    entered: list[list[Tensor]] = [[], []]
    for each, kept in zip((model, parent), entered, strict=True):
        for layer in each.model.layers:

            def keep(_: object, __: object, output: Any, kept: list[Tensor] = kept) -> None:
                kept.append(output if isinstance(output, Tensor) else output[0])

            layer.register_forward_hook(keep)
    peak = pico_run.recipe.distil.learning_rate
    for step in range(steps):
        entered[0].clear(), entered[1].clear()
        kl, cosine, lm = losses(pico_data.training_batch(step, 8, pico_run.recipe.seed))
        (kl + cosine + settings.get("lm_weight", 0.0) * lm).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak if step < 1 else peak * 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        optimizer.step()
        optimizer.zero_grad()
    assert distillation_curve(found)[-1] == min(distillation_curve(found), key=lambda point: point["validation_kl"])
    expected = dict(model.named_parameters())
    for name, value in weights(found).items():
        torch.testing.assert_close(
            value, expected[name].data, rtol=1e-3, atol=2e-5, msg=lambda line, name=name: f"{name}: {line}"
        )


def test_the_parent_itself_starts_without_a_loss(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    own = tuple(block.name for block in pico_parent.architecture.blocks)
    realised = realise(pico_run, pico_parent, pico_library, own)
    found = distil(pico_run, pico_parent, realised, pico_data)
    start = distillation_curve(found)[0]
    assert start["validation_kl"] == pytest.approx(0.0, abs=1e-6)
    before, after = weights(realised), weights(found)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_diverged_training_stops_with_a_line(distilled: Distil) -> None:
    with pytest.raises(PuzzleError, match=r"lower distil\.learning_rate"):
        distilled(learning_rate=1e30)


@pytest.mark.usefixtures("saves_every_step")
def test_a_training_that_was_cut_off_ends_as_if_it_never_was(distilled: Distil, pico_data: TokenData) -> None:
    expected = distilled("undisturbed")
    for _ in range(2):
        with pytest.raises(Killed):
            distilled("disturbed", data=CutData.of(pico_data, 12))
    found = distilled("disturbed")
    assert distillation_curve(found) == distillation_curve(expected)
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(expected).items())


def test_where_and_how_it_is_executed_changes_no_address(distilled: Distil) -> None:
    address = distilled(tokens=256).address
    assert distilled(tokens=256, execution={"checkpointing": True}).address == address
    assert distilled(tokens=256, documents=False).address != address


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"accumulate": 3}, "does not divide batch_size 8"),
        ({"teacher_cache": 8, "kl_weight": 0}, "raise kl_weight"),
        ({"cosine_weight": 0, "kl_weight": 0}, "nothing would be learned"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DistilSettings.model_validate(settings)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"documents": False}], ids=str)
def test_training_does_not_wait_for_the_device_every_step(settings: dict[str, Any], distilled: Distil) -> None:
    """Both trainings have as many held-out points."""
    counts = []
    for steps in (80, 160):
        with Waits() as waits:
            distilled(str(steps), tokens=steps * 2 * 32, batch_size=2, validation_tokens=64, **settings)
        counts.append(waits.count)
    assert counts[1] - counts[0] <= (160 - 80) // 4
