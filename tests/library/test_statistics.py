"""Calibration moments against a plain computation in float64, with hooks on the original modules."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.data import TokenData
from puzzle.library import Statistics, calibrate
from puzzle.parents import Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, read_tensors


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
    for half in ("attention", "ffn"):
        h, y = flat[f"h_{half}"], flat[f"y_{half}"]
        moments = pico_statistics.half(2, half)  # type: ignore[arg-type]
        _close(moments["input_mean"], h.mean(0))
        _close(moments["input_second_moment"], h.T @ h / n)
        _close(moments["output_mean"], y.mean(0))
        _close(moments["cross_moment"], y.T @ h / n)
        _close(moments["output_power"], y.square().mean())
    ffn = pico_statistics.half(2, "ffn")
    _close(ffn["activation_mean_abs"], flat["a"].abs().mean(0))
    _close(ffn["activation_second_moment"], flat["a"].T @ flat["a"] / n)
    weight = layer.self_attn.o_proj.weight.detach()
    groups = [(flat["heads"][:, g : g + 12] @ weight[:, g : g + 12].T).norm(dim=1).mean() for g in range(0, 48, 12)]
    _close(pico_statistics.half(2, "attention")["group_contribution"], torch.stack(groups))
    of_layer = pico_statistics.layer(2)
    assert of_layer.keys() == {"influence", "block_power", "block_contribution_power"}
    _close(of_layer["block_power"], flat["left"].square().mean())
    _close(of_layer["block_contribution_power"], (flat["left"] - flat["entered"]).square().mean())
    influence = 1 - torch.cosine_similarity(flat["entered"], flat["left"], dim=-1).mean()
    assert abs(pico_statistics.influence(4)[2] - float(influence)) < 1e-5


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_streamed_parent_gives_the_same_moments(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, tmp_path: Path
) -> None:
    recipe = pico_run.recipe.model_copy(update={"execution": ExecutionSettings(memory="1B")})
    run = replace(pico_run, path=tmp_path, recipe=recipe, _used={})
    streamed = calibrate(run, pico_parent, pico_data)
    assert streamed.address == pico_statistics.address
    files = sorted(file.name for file in streamed.path.glob("*.safetensors"))
    assert files == [f"layer{layer:03d}.safetensors" for layer in range(4)]
    for file in files:
        found, expected = read_tensors(streamed.path / file), read_tensors(pico_statistics.path / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
