"""Subblocks of a pico parent with what calibration would have seen of them, and plain references."""

import torch
from tests.conftest import pico_puzzle
from torch import Tensor

from puzzle.modeling import PuzzleForCausalLM
from puzzle.variants import ParentSubblock, State, Subblock, split_state
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery

TOKENS = 200


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
    """What channels are ranked and refitted by."""
    return {
        "activation_mean_abs": activation_NI.abs().mean(0),
        "activation_second_moment": activation_NI.T @ activation_NI / len(activation_NI),
    }


def spread_activations(channels: int, tokens: int = TOKENS) -> Tensor:
    """Correlated activations with a mean, whose channels differ in scale by orders of magnitude, [tokens, channels]."""
    generator = torch.Generator().manual_seed(channels + tokens)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 2, channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]
    noise = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    return (noise @ mixing + 0.5) * scales


def pico_parent(**overrides: object) -> PuzzleForCausalLM:
    return pico_puzzle("kv4+w48", "kv4+w48", **overrides).double()


def subblock(model: PuzzleForCausalLM, subblock: Subblock, statistics: State) -> ParentSubblock:
    """The given half of layer 1, in float64."""
    state = split_state(model.model.layers[1].state_dict(), subblock)
    own = {"attention": GroupedQuery(4), "ffn": GatedFFN(48)}[subblock]
    return ParentSubblock(config=model.config, variant=own, state=state, statistics=statistics)
