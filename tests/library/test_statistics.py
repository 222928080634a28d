"""Calibration moments against a plain computation in float64, with hooks on the original modules."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Waits
from tests.library.conftest import CutData, Killed
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.data import TokenData
from puzzle.distributed.state import SaveTimer
from puzzle.library import Statistics, calibrate, statistics
from puzzle.parents import Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, read_tensors, write_tensors
from puzzle.variants import SUBBLOCKS, State


def test_moments_equal_a_plain_computation(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_parent.path).double()
    layer = model.model.layers[2]
    seen: dict[str, Tensor] = {}
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.update(h_attention=args[0]))
    layer.self_attn.register_forward_hook(lambda _, __, output: seen.update(y_attention=output[0]))
    layer.mlp.register_forward_hook(lambda _, args, output: seen.update(h_ffn=args[0], y_ffn=output))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(a_attention=args[0]))
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(a_ffn=args[0]))
    layer.register_forward_hook(lambda _, args, output: seen.update(entered=args[0], left=output))
    (sequences,) = pico_data.batches("calibration", 10_000, pico_run.recipe.calibration.tokens)
    with torch.no_grad():
        model(sequences[:, :-1])
    flat = {name: value.flatten(0, 1) for name, value in seen.items()}
    for which in SUBBLOCKS:
        h, y, a = (flat[f"{name}_{which}"] for name in "hya")
        n = len(a)
        moments = {
            "input_mean": h.mean(0),
            "input_second_moment": h.T @ h / n,
            "output_mean": y.mean(0),
            "cross_moment": y.T @ h / n,
            "output_power": y.square().mean(),
            "activation_mean_abs": a.abs().mean(0),
            "activation_second_moment": a.T @ a / n,
        }
        _close(pico_statistics.moments(2, which), moments)
    entered, left = flat["entered"], flat["left"]
    influence = 1 - torch.cosine_similarity(entered, left, dim=-1).mean()
    powers = {"block_power": left.square().mean(), "block_contribution_power": (left - entered).square().mean()}
    _close(pico_statistics.moments(2), {"influence": influence, **powers})


def _close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(found[name].double(), moment, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calibrated(pico_run: Run, pico_parent: Parent, pico_data: TokenData, tmp_path: Path) -> Callable[..., Statistics]:
    """Moments in a run folder of its own, with this `execution.memory`; killed after so many batches of text."""

    def gathered(memory: str | None = None, cut: int | None = None) -> Statistics:
        recipe = pico_run.recipe.model_copy(update={"execution": ExecutionSettings(memory=memory)})
        run = replace(pico_run, path=tmp_path, recipe=recipe)
        return calibrate(run, pico_parent, pico_data if cut is None else CutData.of(pico_data, cut))

    return gathered


def test_calibration_does_not_wait_for_the_device_every_batch(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, tmp_path: Path
) -> None:
    counts = []
    for batches in (2, 6):
        settings = pico_run.recipe.calibration.model_copy(update={"tokens": batches * 8 * 32})
        run = replace(pico_run, path=tmp_path, recipe=pico_run.recipe.model_copy(update={"calibration": settings}))
        with Waits() as waits:
            calibrate(run, pico_parent, pico_data)
        counts.append(waits.count)
    assert counts[0] == counts[1]


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
    calibrated: Callable[..., Statistics], pico_statistics: Statistics, memory: str
) -> None:
    assert_the_same(calibrated(memory), pico_statistics)


@pytest.mark.parametrize(
    ("before", "batches", "after"), [(None, 4, None), ("1B", 52, "1B"), ("1B", 52, None), (None, 4, "1B")]
)
def test_calibration_goes_on_where_it_was_saved(
    calibrated: Callable[..., Statistics],
    pico_statistics: Statistics,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    batches: int,
    after: str | None,
) -> None:
    monkeypatch.setattr(SaveTimer, "due", lambda _: True)
    with pytest.raises(Killed):
        calibrated(before, batches)
    assert_the_same(calibrated(after), pico_statistics)


def test_what_was_saved_is_not_computed_again(
    calibrated: Callable[..., Statistics],
    pico_statistics: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is all that the sums take: the memory that layers are grouped by."""
    monkeypatch.setattr(SaveTimer, "due", lambda _: True)
    with pytest.raises(Killed):
        calibrated(cut=4)
    (file,) = tmp_path.rglob("partial.safetensors")
    sums = read_tensors(file)
    matrices_bytes = 4 * (32 * 32**2 + 4 * 64**2 + 4 * 48**2)
    assert matrices_bytes < sum(value.nbytes for value in sums.values()) < 1.1 * matrices_bytes
    write_tensors(file, sums | {"2.influence": sums["2.influence"] + 1000})
    again = calibrated()
    changes = [again.moments(i)["influence"] - pico_statistics.moments(i)["influence"] for i in range(4)]
    assert [change > 0.1 for change in changes] == [False, False, True, False]


@pytest.mark.parametrize(("error", "falls_back"), [(1e-5, False), (1e-4, True)])
def test_tf32_is_taken_if_it_is_good_enough_for_the_first_batch(
    error: float, falls_back: bool, monkeypatch: pytest.MonkeyPatch, pico_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted error, as sums that are cut off have it; never for values that TF32 itself would cut."""
    products = statistics._products

    def cut(left_NI: Tensor, right_NJ: Tensor, fast: bool) -> Iterator[Tensor]:
        return (product * (1 - error * fast) for product in products(left_NI, right_NJ, fast))

    monkeypatch.setattr(statistics, "_products", cut)
    hidden_BTD = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    hidden_BTD[..., 3] = 0.0
    assert not statistics._suits_tf32(pico_run, hidden_BTD)
    assert statistics._suits_tf32(pico_run, hidden_BTD.bfloat16()) == (not falls_back)
    assert ("moments in TF32 are off by 1.0e-04" in capsys.readouterr().out) == falls_back


def test_moments_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left_NI, right_NJ = torch.randn(50, 6), torch.randn(50, 4)
    (whole_IJ,) = statistics._products(left_NI, right_NJ, True)
    assert torch.equal(whole_IJ, left_NI.T @ right_NJ)
    monkeypatch.setattr(statistics, "rows_at_once", lambda device: 16)
    parts = [*statistics._products(left_NI, right_NJ, False)]
    assert len(parts) == 4
    torch.testing.assert_close(sum(parts), whole_IJ)
    found: State = {}
    statistics._record("ffn.", found, False, torch.nn.Identity(), (left_NI.view(2, 25, 6),))
    torch.testing.assert_close(found["ffn.activation_second_moment"], left_NI.T @ left_NI)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_multiplies_bfloat16_values_in_tf32_well_enough() -> None:
    hidden_ND = torch.randn(16_384, 512, device="cuda").add_(3.0).bfloat16().float()
    found_DD = sum(product.double() for product in statistics._products(hidden_ND, hidden_ND, True))
    expected_DD = hidden_ND.double().T @ hidden_ND.double()
    scale_D = expected_DD.diagonal().sqrt()
    assert float(((found_DD - expected_DD) / torch.outer(scale_D, scale_D)).abs().max()) <= statistics._ALLOWED_ERROR
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
