"""Subblocks of a pico parent with what calibration would have seen of them."""

from functools import cache

import torch
from tests.conftest import pico_puzzle
from torch import Tensor

from puzzle.modeling import PuzzleForCausalLM
from puzzle.recipe import LibrarySettings
from puzzle.variants import ParentSubblock, State, Subblock, parse_variant, split_state


def moments(input_ND: Tensor, output_ND: Tensor) -> State:
    """What linear maps are fitted by, of paired inputs and outputs."""
    return {
        "input_mean": input_ND.mean(0),
        "output_mean": output_ND.mean(0),
        "input_second_moment": input_ND.T @ input_ND / len(input_ND),
        "cross_moment": output_ND.T @ input_ND / len(input_ND),
        "output_power": output_ND.square().mean(),
    }


def activation_moments(activation_NI: Tensor) -> State:
    """What channels are ranked and down projections updated by."""
    return {
        "activation_mean_abs": activation_NI.abs().mean(0),
        "activation_second_moment": activation_NI.T @ activation_NI / len(activation_NI),
    }


def spread_activations(channels: int, tokens: int = 200) -> Tensor:
    """Correlated activations with a mean, whose channels differ in scale by orders of magnitude, [tokens, channels]."""
    generator = torch.Generator().manual_seed(channels + tokens)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 2, channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]
    noise = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    return (noise @ mixing + 0.5) * scales


@cache
def pico_parent(kv_heads: int = 4, bias: bool = False) -> PuzzleForCausalLM:
    """Two layers in float64, shared by all tests: none may change it."""
    return pico_puzzle(*[f"kv{kv_heads}+w48"] * 2, attention_bias=bias, mlp_bias=bias).double()


def subblock(
    model: PuzzleForCausalLM,
    subblock: Subblock,
    statistics: State,
    settings: LibrarySettings | None = None,
    kv_heads: int = 4,
) -> ParentSubblock:
    """A subblock of layer 1, in the model's dtype."""
    state = split_state(model.model.layers[1].state_dict(), subblock, model.config)
    own = parse_variant(subblock, f"kv{kv_heads}" if subblock == "attention" else "w48")
    return ParentSubblock(
        config=model.config, variant=own, state=state, statistics=statistics, settings=settings or LibrarySettings()
    )
