"""How variants start, against plain references in float64."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from tests.variants.conftest import activation_moments, moments, pico_parent, spread_activations, subblock
from torch import Tensor
from torch.nn.functional import linear

from puzzle.recipe import LibrarySettings
from puzzle.variants import ParentSubblock, State, Variant, parse_variant
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.linear import LinearAttention, LinearFFN, LowRankFFN
from puzzle.variants.least_squares import RIDGE, ridge

PAPER = LibrarySettings(start="paper")
BIAS = pytest.mark.parametrize("bias", [False, True])


def output(parent: ParentSubblock, variant: Variant, state: State, tokens: int = 7) -> Tensor:
    """What a subblock with these weights adds to random hidden states, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(2, tokens, 32, dtype=torch.float64, generator=generator)
    context = pico_parent().model.context(hidden_BTD)
    return variant.build(parent.config, state).subblock_output(variant.subblock, hidden_BTD, **context)


@BIAS
@pytest.mark.parametrize("heads", [1, 2])
def test_merged_kv_heads_are_means(heads: int, bias: bool) -> None:
    parent = subblock(pico_parent(bias=bias), "attention", {})
    start = GroupedQuery(heads).initialise(parent)
    assert start.keys() == parent.state.keys()
    for name, tensor in parent.state.items():
        if ".k_proj." in name or ".v_proj." in name:
            groups = tensor.numpy().reshape(heads, 4 // heads, 12, *tensor.shape[1:])
            merged = groups.mean(1).reshape(heads * 12, *tensor.shape[1:])
            np.testing.assert_allclose(start[name].numpy(), merged, atol=1e-15)
        else:
            assert torch.equal(start[name], tensor)


def test_a_window_starts_from_the_same_weights() -> None:
    parent = subblock(pico_parent(), "attention", {})
    for heads in (4, 2):
        full, window = GroupedQuery(heads).initialise(parent), GroupedQuery(heads, 4, 1).initialise(parent)
        assert all(torch.equal(window[name], full[name]) for name in full)
        # Below the window's length nothing has changed; beyond it something has.
        pair = output(parent, GroupedQuery(heads), full), output(parent, GroupedQuery(heads, 4, 1), window)
        assert (pair[0] == pair[1]).all(-1)[0].tolist() == [True] * 5 + [False] * 2


@BIAS
@pytest.mark.parametrize("width", [1, 16, 47])
def test_a_narrower_ffn_keeps_the_best_channels_and_updates_the_down_projection(width: int, bias: bool) -> None:
    """Least squares on the activations, with one row more a channel: its damping, drawing to the parent's weight."""
    activation_NI = spread_activations(48)
    parent = subblock(pico_parent(bias=bias), "ffn", activation_moments(activation_NI))
    start = GatedFFN(width).initialise(parent)
    kept = sorted(parent.channels[:width].tolist())
    assert start.keys() == parent.state.keys()
    for name, tensor in parent.state.items():
        if name != "mlp.down_proj.weight":
            expected = tensor[kept] if ".gate_proj." in name or ".up_proj." in name else tensor
            assert torch.equal(start[name], expected)
    weight, activation = parent.state["mlp.down_proj.weight"].numpy(), activation_NI.numpy()
    rows = np.diag(np.sqrt(RIDGE * (activation**2).sum(0)))[:, kept]
    inputs = np.concatenate([activation[:, kept], rows])
    wanted = np.concatenate([activation @ weight.T, rows @ weight[:, kept].T])
    updated = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    np.testing.assert_allclose(start["mlp.down_proj.weight"].numpy(), updated, rtol=1e-6, atol=1e-9)


def damped_rows(input_ND: Tensor, output_ND: Tensor, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs, centred for a bias, and one row more an input: its damping, drawing to zero."""
    inputs, outputs = input_ND.numpy(), output_ND.numpy()
    rows = np.diag(np.sqrt(RIDGE * (inputs**2).sum(0)))
    if bias:
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    return np.concatenate([inputs, rows]), np.concatenate([outputs, np.zeros((len(rows), outputs.shape[1]))])


@BIAS
def test_linear_maps_are_damped_least_squares(bias: bool) -> None:
    input_ND = spread_activations(6)
    output_ND = spread_activations(5).tanh() + input_ND @ torch.randn(6, 5, dtype=torch.float64)
    (found,), offset = ridge(moments(input_ND, output_ND), bias=bias)
    weight = np.linalg.lstsq(*damped_rows(input_ND, output_ND, bias), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), weight, rtol=1e-6, atol=1e-9)
    assert (offset is not None) is bias
    if offset is not None:
        expected = output_ND.numpy().mean(0) - weight @ input_ND.numpy().mean(0)
        np.testing.assert_allclose(offset.numpy(), expected, rtol=1e-6, atol=1e-9)


@BIAS
def test_a_low_rank_map_is_the_best_of_its_rank(bias: bool) -> None:
    """Eckart and Young on whitened data: least squares on data and damping rows, the fit cut by its own SVD."""
    input_ND = spread_activations(32)
    output_ND = spread_activations(32, 200).tanh() + input_ND @ torch.randn(32, 32, dtype=torch.float64)
    start = LowRankFFN(5).initialise(subblock(pico_parent(bias=bias), "ffn", moments(input_ND, output_ND)))
    inputs, outputs = damped_rows(input_ND, output_ND, bias)
    full = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    basis = np.linalg.svd(inputs @ full, full_matrices=False)[2][:5]
    found = (start["mlp.expand_proj.weight"] @ start["mlp.reduce_proj.weight"]).numpy()
    np.testing.assert_allclose(found, (full @ basis.T @ basis).T, rtol=1e-5, atol=1e-8 * np.abs(full).max())
    assert start["mlp.reduce_proj.weight"].shape == (5, 32)
    assert ("mlp.expand_proj.bias" in start) is bias
    if bias:
        expected = output_ND.numpy().mean(0) - found @ input_ND.numpy().mean(0)
        np.testing.assert_allclose(start["mlp.expand_proj.bias"].numpy(), expected, rtol=1e-5, atol=1e-6)


@BIAS
def test_the_papers_starts_of_an_ffn_are_weights_alone(bias: bool) -> None:
    """Slices; and W_down W_up, which is the FFN itself where the gate is 1."""
    parent = subblock(pico_parent(bias=bias), "ffn", activation_moments(spread_activations(48)), PAPER)
    state, narrow, kept = parent.state, GatedFFN(16).initialise(parent), parent.channels[:16].sort().values
    assert torch.equal(narrow["mlp.down_proj.weight"], state["mlp.down_proj.weight"][:, kept])
    assert torch.equal(narrow["mlp.gate_proj.weight"], state["mlp.gate_proj.weight"][kept])
    hidden_ND = torch.randn(7, 32, dtype=torch.float64)
    up_NI = linear(hidden_ND, state["mlp.up_proj.weight"], state.get("mlp.up_proj.bias"))
    expected_ND = linear(up_NI, state["mlp.down_proj.weight"], state.get("mlp.down_proj.bias"))
    start, low = LinearFFN().initialise(parent), LowRankFFN(31).initialise(parent)
    found_ND = LinearFFN().build(parent.config, start).mlp(hidden_ND)
    torch.testing.assert_close(found_ND, expected_ND)
    found_ND = LowRankFFN(31).build(parent.config, low).mlp(hidden_ND)
    lost = torch.linalg.svdvals(start["mlp.linear_mlp.weight"])[-1]
    assert (found_ND - expected_ND).norm() <= lost * hidden_ND.norm() * (1 + 1e-9)


@BIAS
@pytest.mark.parametrize("heads", [4, 2])
def test_the_papers_linear_map_is_attention_to_itself(heads: int, bias: bool) -> None:
    """A sequence of one token has nothing else to attend to."""
    parent = subblock(pico_parent(heads, bias), "attention", {}, PAPER, heads)
    found = output(parent, LinearAttention(), LinearAttention().initialise(parent), tokens=1)
    torch.testing.assert_close(found, output(parent, parent.variant, parent.state, tokens=1))


@pytest.mark.parametrize("settings", [LibrarySettings(), PAPER], ids=["default", "paper"])
def test_the_dtype_and_the_norm_are_the_parents(settings: LibrarySettings) -> None:
    model = deepcopy(pico_parent()).to(torch.bfloat16)
    statistics = activation_moments(spread_activations(48)) | moments(*torch.randn(2, 90, 32))
    for which, names in {"attention": ["kv2", "kv2win8", "linear"], "ffn": ["w16", "rank4", "linear"]}.items():
        parent = subblock(model, which, statistics, settings)
        for state in (parse_variant(which, name).initialise(parent) for name in names):
            assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
            assert all(torch.equal(state[name], tensor) for name, tensor in parent.norm.items())
        assert parse_variant(which, "none").initialise(parent) == {}


def test_inputs_that_hardly_vary_get_no_weight() -> None:
    """Never active: no weight. Constant: centring leaves only rounding error of it, and its work goes to the bias."""
    input_ND = spread_activations(6)
    input_ND[:, 2] = 0
    (weight,), _ = ridge(moments(input_ND, spread_activations(5)), bias=False)
    assert weight.isfinite().all()
    assert weight[:, 2].abs().max() == 0
    (nothing,), _ = ridge(moments(torch.zeros(9, 6), torch.zeros(9, 5)), bias=True)
    assert nothing.abs().max() == 0
    input_ND[:, 2] = 1234.5
    output_ND = spread_activations(5).float()
    (weight,), _ = ridge(moments(input_ND.float(), output_ND), bias=True)
    assert (weight[:, 2] * 1234.5).abs().max() < 1e-3 * output_ND.abs().max()
