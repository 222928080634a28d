"""Losses from moments alone equal those measured on the calibration data, and decide what is left out."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.variants.conftest import activation_moments, moments, pico_parent, subblock
from torch import Tensor

from puzzle.recipe import LibrarySettings
from puzzle.variants import (
    ParentSubblock,
    Subblock,
    derive_space,
    parse_variant,
    prune_space,
)

STARTS = [LibrarySettings(), LibrarySettings(channels="independent"), LibrarySettings(start="paper")]
KNOWN = [("ffn", name) for name in ("w48", "w20", "rank6", "linear", "none")] + [
    ("attention", name) for name in ("kv4", "linear", "none")
]


@cache
def calibrated(which: Subblock, bias: bool) -> tuple[ParentSubblock, Tensor, dict[str, Any], Tensor]:
    """A subblock with the moments of what it did to some text, its inputs with their context, and its outputs."""
    model = pico_parent(bias=bias)
    layer = model.model.layers[1]
    hidden_BTD = torch.randn(10, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    context = model.model.context(hidden_BTD)
    with torch.no_grad():
        normed_ND = layer.norm_of(which)(hidden_BTD).flatten(0, 1)
        output_BTD = layer.subblock_output(which, hidden_BTD, **context)
        activation_NI = layer.mlp.act_fn(layer.mlp.gate_proj(normed_ND)) * layer.mlp.up_proj(normed_ND)
    statistics = moments(normed_ND, output_BTD.flatten(0, 1)) | activation_moments(activation_NI)
    return subblock(model, which, statistics), hidden_BTD, context, output_BTD


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", STARTS, ids=["default", "independent", "paper"])
@pytest.mark.parametrize(("which", "name"), KNOWN)
def test_the_expected_loss_is_the_measured_one(
    which: Subblock, name: str, settings: LibrarySettings, bias: bool
) -> None:
    """Also of other weights than the best ones."""
    parent, hidden_BTD, context, output_BTD = calibrated(which, bias)
    parent, variant = replace(parent, settings=settings), parse_variant(which, name)
    state = variant.initialise(parent)
    last = [f"{variant.output_projection}.weight", "mlp.linear_mlp.weight", "self_attn.linear_attn.weight"]
    worse = {key: 0.5 * value if key in last else value for key, value in state.items()}
    for weights in (state,) if variant == parent.variant else (state, worse):
        error_BTD = variant.build(parent.config, weights).subblock_output(which, hidden_BTD, **context) - output_BTD
        measured = float(error_BTD.square().sum() / output_BTD.square().sum())
        assert variant.expected_loss(parent, weights) == pytest.approx(measured, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("channels", ["iterative", "independent"])
def test_it_falls_with_the_size(channels: Any) -> None:
    parent = replace(calibrated("ffn", True)[0], settings=LibrarySettings(channels=channels))
    for names in (["w4", "w12", "w24", "w40", "w48"], ["rank1", "rank4", "rank9", "rank15", "linear"]):
        variants = [parse_variant("ffn", name) for name in names]
        losses = [variant.expected_loss(parent, variant.initialise(parent)) for variant in variants]
        assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
        assert losses[0] < 1  # type: ignore[operator]


def pruned(which: Subblock, starts: dict[str, float | None], ratio: float) -> list[str]:
    """What is left of these variants of layer 1; the other layer has the same, of unknown losses."""
    named: dict[str, Any] = {"attention": [], "ffn": []} | {which: list(starts)}
    config = pico_parent().config
    space = derive_space(config, kv_heads=[], ffn_widths=[], **named)
    losses: dict[tuple[int, Subblock, str], float | None] = {(0, which, name): None for name in starts}
    losses |= {(1, which, name): loss for name, loss in starts.items()}
    losses |= {(layer, *own): 0.0 for layer in (0, 1) for own in (("attention", "kv4"), ("ffn", "w48"))}
    left = prune_space(space, losses, config, ratio)
    assert left.layers[0] == space.layers[0]
    assert left.layers[1].parent == space.layers[1].parent
    return [variant.name for variant in left.layers[1].subblock(which)[1:]]


_STARTS = {"w24": 0.3, "w10": 0.5, "linear": 1.1, "rank3": 0.1, "none": 1.0}


@pytest.mark.parametrize(
    ("which", "starts", "ratio", "gone"),
    [
        # Parameters: w10 30 * 32, linear 32 * 32, w24 72 * 32, rank3 6 * 32.
        ("ffn", _STARTS, 2.0, {"w24", "w10", "linear"}),
        ("ffn", _STARTS, 4.0, {"w10", "linear"}),
        ("ffn", _STARTS, 11.5, set()),
        # Never none, nor the unknown, nor what is not larger.
        ("ffn", {"w24": None, "linear": 0.9, "rank3": 2.9, "none": 1.5}, 2.0, set()),
        ("ffn", {"w24": None, "linear": 0.9, "rank3": 2.9, "none": 1.5}, 1.5, {"rank3"}),
        # kv2 has fewer parameters than kv4win8, but a larger cache; kv1win8 has less of both.
        ("attention", {"kv4win8": 0.9, "kv2": 0.1, "none": 1.0}, 2.0, set()),
        ("attention", {"kv4win8": 0.9, "kv2": 0.1, "none": 1.0, "kv1win8": 0.1}, 2.0, {"kv4win8"}),
    ],
)
def test_what_starts_much_worse_than_something_smaller_is_left_out(
    which: Subblock, starts: dict[str, float | None], ratio: float, gone: set[str]
) -> None:
    assert pruned(which, starts, ratio) == [name for name in starts if name not in gone]
