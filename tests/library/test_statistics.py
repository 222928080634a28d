"""Calibration moments against a plain computation in float64, with hooks on the original modules."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.library.conftest import Killed
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.data import TokenData
from puzzle.distributed.state import SaveTimer
from puzzle.library import Statistics, calibrate
from puzzle.parents import Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, read_tensors, write_tensors


def test_moments_equal_a_plain_computation(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_parent.path).double()
    layer = model.model.layers[2]
    seen: dict[str, Tensor] = {}
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.update(h_attention=args[0]))
    layer.self_attn.register_forward_hook(lambda _, __, output: seen.update(y_attention=output[0]))
    layer.mlp.register_forward_hook(lambda _, args, output: seen.update(h_ffn=args[0], y_ffn=output))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(a=args[0]))
    layer.register_forward_hook(lambda _, args, output: seen.update(entered=args[0], left=output))
    (sequences,) = pico_data.batches("calibration", 10_000, pico_run.recipe.calibration.tokens)
    with torch.no_grad():
        model(sequences[:, :-1])
    flat = {name: value.flatten(0, 1) for name, value in seen.items()}
    n = len(flat["a"])
    for subblock in ("attention", "ffn"):
        h, y = flat[f"h_{subblock}"], flat[f"y_{subblock}"]
        moments = pico_statistics.subblock(2, subblock)  # type: ignore[arg-type]
        _close(moments["input_mean"], h.mean(0))
        _close(moments["input_second_moment"], h.T @ h / n)
        _close(moments["output_mean"], y.mean(0))
        _close(moments["cross_moment"], y.T @ h / n)
        _close(moments["output_power"], y.square().mean())
    ffn = pico_statistics.subblock(2, "ffn")
    _close(ffn["activation_mean_abs"], flat["a"].abs().mean(0))
    _close(ffn["activation_second_moment"], flat["a"].T @ flat["a"] / n)
    weight = layer.self_attn.o_proj.weight.detach()
    groups = [(flat["heads"][:, g : g + 12] @ weight[:, g : g + 12].T).norm(dim=1).mean() for g in range(0, 48, 12)]
    _close(pico_statistics.subblock(2, "attention")["group_contribution"], torch.stack(groups))
    of_layer = pico_statistics.layer(2)
    assert of_layer.keys() == {"influence", "block_power", "block_contribution_power"}
    _close(of_layer["block_power"], flat["left"].square().mean())
    _close(of_layer["block_contribution_power"], (flat["left"] - flat["entered"]).square().mean())
    influence = 1 - torch.cosine_similarity(flat["entered"], flat["left"], dim=-1).mean()
    assert abs(pico_statistics.influence(4)[2] - float(influence)) < 1e-5


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def calibrated(run: Run, folder: Path, parent: Parent, data: TokenData, memory: str | None) -> Statistics:
    recipe = run.recipe.model_copy(update={"execution": ExecutionSettings(memory=memory)})
    return calibrate(replace(run, path=folder, recipe=recipe), parent, data)


def assert_the_same(found: Statistics, expected: Statistics) -> None:
    """To the last bit, and nothing else is left in the folder."""
    assert found.address == expected.address
    files = [f"layer{layer:03d}.safetensors" for layer in range(4)]
    assert sorted(file.name for file in found.path.rglob("*.safetensors")) == files
    for file in files:
        moments, expected_moments = read_tensors(found.path / file), read_tensors(expected.path / file)
        assert moments.keys() == expected_moments.keys()
        assert all(torch.equal(moments[name], expected_moments[name]) for name in moments)


@pytest.mark.parametrize("memory", ["1B", "150kB"])
def test_a_streamed_parent_gives_the_same_moments(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, tmp_path: Path, memory: str
) -> None:
    assert_the_same(calibrated(pico_run, tmp_path, pico_parent, pico_data, memory), pico_statistics)


@pytest.mark.parametrize(
    ("before", "batches", "after"), [(None, 4, None), ("1B", 52, "1B"), ("1B", 52, None), (None, 4, "1B")]
)
def test_calibration_goes_on_where_it_was_saved(
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_statistics: Statistics,
    cut_after: Callable[[int], TokenData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    batches: int,
    after: str | None,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SaveTimer, "due", lambda _: True)
        with pytest.raises(Killed):
            calibrated(pico_run, tmp_path, pico_parent, cut_after(batches), before)
    assert_the_same(calibrated(pico_run, tmp_path, pico_parent, pico_data, after), pico_statistics)


def test_what_was_saved_is_not_computed_again(
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_statistics: Statistics,
    cut_after: Callable[[int], TokenData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is all that the sums take: the memory that layers are grouped by."""
    monkeypatch.setattr(SaveTimer, "due", lambda _: True)
    with pytest.raises(Killed):
        calibrated(pico_run, tmp_path, pico_parent, cut_after(4), None)
    (file,) = tmp_path.rglob("partial.safetensors")
    sums = read_tensors(file)
    matrices_bytes = 4 * (32 * 32**2 + 4 * 64**2)
    assert matrices_bytes < sum(value.nbytes for value in sums.values()) < 1.1 * matrices_bytes
    write_tensors(file, sums | {"2..influence": sums["2..influence"] + 1000})
    found = calibrated(pico_run, tmp_path, pico_parent, pico_data, None).influence(4)
    assert [value > 0.1 + expected for value, expected in zip(found, pico_statistics.influence(4), strict=True)] == [
        False,
        False,
        True,
        False,
    ]
