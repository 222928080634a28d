"""Losses from moments alone equal those measured on the calibration data, and decide what is left out."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tests.conftest import pico_puzzle
from tests.variants.conftest import activation_moments, moments, pico_parent, subblock
from torch import Tensor

from puzzle.variants import ParentSubblock, Space, Start, Subblock, Variant, derive_space, expected_losses, prune_space
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.linear import LinearFFN, LowRankFFN
from puzzle.variants.kinds.none import NoFFN

VARIANTS = [GatedFFN(48), GatedFFN(20), LowRankFFN(6), LinearFFN(), NoFFN()]
STARTS = [Start(), Start(channels="independent"), Start(method="paper")]


def calibrated(bias: bool) -> tuple[ParentSubblock, Tensor, Tensor]:
    """A real FFN with the moments of what it did to some text, its inputs and its outputs, [N, D]."""
    model = pico_parent(mlp_bias=bias)
    layer = model.model.layers[1]
    hidden_ND = torch.randn(300, 32, dtype=torch.float64) + 0.5
    normed_ND = layer.post_attention_layernorm(hidden_ND)
    mlp: Any = layer.mlp
    activation_NI = mlp.act_fn(mlp.gate_proj(normed_ND)) * mlp.up_proj(normed_ND)
    output_ND = mlp(normed_ND)
    with torch.no_grad():
        statistics = moments(normed_ND, output_ND) | activation_moments(activation_NI)
    return subblock(model, "ffn", {k: value.detach() for k, value in statistics.items()}), hidden_ND, output_ND


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_expected_loss_is_the_measured_one(variant: Variant, start: Start, bias: bool) -> None:
    parent, hidden_ND, output_ND = calibrated(bias)
    parent = replace(parent, start=start)
    state = variant.initialise(parent)
    found_ND = variant.build(parent.config, state)(hidden_ND) - hidden_ND
    measured = float((found_ND - output_ND).square().sum() / output_ND.square().sum())
    assert variant.expected_loss(parent, state) == pytest.approx(measured, rel=1e-9, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS[1:4], ids=str)
def test_rounded_weights_lose_what_rounding_loses(variant: Variant) -> None:
    """The loss is that of the weights given, not of the best ones."""
    parent, hidden_ND, output_ND = calibrated(bias=False)
    state = variant.initialise(parent)
    worse = {name: 0.5 * value if value.ndim == 2 and "proj" in name else value for name, value in state.items()}
    if isinstance(variant, GatedFFN):
        worse = state | {"mlp.down_proj.weight": 0.5 * state["mlp.down_proj.weight"]}
    if isinstance(variant, LinearFFN):
        worse = state | {"mlp.linear_mlp.weight": 0.5 * state["mlp.linear_mlp.weight"]}
    found_ND = variant.build(parent.config, worse)(hidden_ND) - hidden_ND
    measured = float((found_ND - output_ND).square().sum() / output_ND.square().sum())
    found = variant.expected_loss(parent, worse)
    assert found == pytest.approx(measured, rel=1e-9)
    assert found > variant.expected_loss(parent, state)  # type: ignore[operator]


@pytest.mark.parametrize("channels", ["iterative", "independent"])
def test_it_falls_with_the_size(channels: Any) -> None:
    parent, _, _ = calibrated(bias=True)
    parent = replace(parent, start=Start(channels=channels))
    ladders: list[list[Variant]] = [[GatedFFN(width) for width in (4, 12, 24, 40, 48)]]
    ladders += [[LowRankFFN(rank) for rank in (1, 4, 9, 15)] + [LinearFFN()]]
    for ladder in ladders:
        losses = [variant.expected_loss(parent, variant.initialise(parent)) for variant in ladder]
        assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
        assert losses[0] < 1  # type: ignore[operator]


def test_every_variant_of_every_layer_is_asked_with_one_half_held_at_a_time() -> None:
    parent, _, _ = calibrated(bias=False)
    space = derive_space(parent.config, kv_heads=[], ffn_widths=[20], attention=["none"], ffn=["none", "rank6"])
    asked: list[tuple[int, Subblock]] = []

    def read(layer: int, which: Subblock) -> ParentSubblock:
        asked.append((layer, which))
        return parent if which == "ffn" else subblock(pico_parent(), "attention", {})

    losses = expected_losses(read, space)
    assert asked == list(product(range(2), ("attention", "ffn")))
    assert list(losses) == [
        (index, subblock, variant.name)
        for index, layer in enumerate(space.layers)
        for subblock in ("attention", "ffn")
        for variant in layer.subblock(subblock)  # type: ignore[arg-type]
    ]
    narrow = GatedFFN(20)
    assert losses[1, "ffn", "w20"] == narrow.expected_loss(parent, narrow.initialise(parent))
    assert (losses[0, "ffn", "w48"], losses[0, "ffn", "none"]) == (0, 1)


def pruned(ffn: dict[str, float | None], attention: dict[str, float | None], ratio: float) -> tuple[list[str], ...]:
    """What is left of a layer of `kv4+w48` with these variants and losses; a second layer loses nothing."""
    config = pico_puzzle("kv4+w48", "kv4+w48").config
    space = derive_space(config, kv_heads=[], ffn_widths=[], attention=list(attention), ffn=list(ffn))
    tables: dict[Subblock, dict[str, float | None]] = {"attention": {"kv4": 0.0} | attention, "ffn": {"w48": 0.0} | ffn}
    losses = {
        (layer, subblock, name): loss if layer == 0 else None
        for layer in range(2)
        for subblock, table in tables.items()
        for name, loss in table.items()
    }
    left: Space = prune_space(space, losses, config, ratio)
    assert left.layers[1] == space.layers[1]
    return [variant.name for variant in left.layers[0].attention], [variant.name for variant in left.layers[0].ffn]


def test_what_starts_much_worse_than_something_smaller_is_left_out() -> None:
    """Parameters: w10 30 * 32, linear 32 * 32, w24 72 * 32, rank3 6 * 32."""
    ffn: dict[str, float | None] = {"w24": 0.3, "w10": 0.5, "linear": 1.1, "rank3": 0.1, "none": 1.0}
    assert pruned(ffn, {}, 2.0)[1] == ["w48", "rank3", "none"]
    assert pruned(ffn, {}, 4.0)[1] == ["w48", "w24", "rank3", "none"]
    assert pruned(ffn, {}, 11.5)[1] == ["w48", *ffn]


def test_never_none_nor_the_unknown_nor_what_is_not_larger() -> None:
    ffn: dict[str, float | None] = {"w24": None, "linear": 0.9, "rank3": 2.9, "none": 1.5}
    assert pruned(ffn, {}, 2.0)[1] == ["w48", *ffn]
    assert pruned(ffn, {}, 1.5)[1] == ["w48", "w24", "linear", "none"]


def test_a_smaller_cache_is_a_reason_to_stay() -> None:
    """kv2 has fewer parameters than kv4win8, but a larger cache; kv1win8 has less of both."""
    attention: dict[str, float | None] = {"kv4win8": 0.9, "kv2": 0.1, "none": 1.0}
    assert pruned({}, attention, 2.0)[0] == ["kv4", *attention]
    assert pruned({}, attention | {"kv1win8": 0.1}, 2.0)[0] == ["kv4", "kv2", "none", "kv1win8"]
