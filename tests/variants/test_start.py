"""How variants start, against plain references in float64."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.variants.conftest import activation_moments, moments, pico_parent, spread_activations, subblock
from torch import Tensor
from torch.nn.functional import linear

from puzzle.variants import Start
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.linear import LinearAttention, LinearFFN, LowRankFFN
from puzzle.variants.kinds.none import NoAttention, NoFFN
from puzzle.variants.least_squares import RIDGE, damping, least_squares_update, linear_loss, reduced_rank, ridge

_NORM = "post_attention_layernorm."


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_merged_kv_heads_are_means(heads: int, bias: bool) -> None:
    parent = subblock(pico_parent(attention_bias=bias), "attention", {})
    start = GroupedQuery(heads).initialise(parent)
    assert start.keys() == parent.state.keys()
    for name, tensor in parent.state.items():
        if ".k_proj." in name or ".v_proj." in name:
            old = tensor.numpy().reshape(4, 12, *tensor.shape[1:])
            group = 4 // heads
            merged = np.stack([old[head * group : (head + 1) * group].mean(0) for head in range(heads)])
            np.testing.assert_allclose(start[name].numpy(), merged.reshape(heads * 12, *tensor.shape[1:]), atol=1e-15)
        else:
            assert torch.equal(start[name], tensor)


def test_equal_kv_heads_merge_without_loss() -> None:
    """The mean goes to the queries that read the merged heads: nothing changes if these were equal."""
    model = pico_parent()
    attention = model.model.layers[1].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        heads = projection.weight.data.view(2, 2, 12, 32)
        heads[:, 1] = heads[:, 0]
    parent = subblock(model, "attention", {})
    hidden_BTD = torch.randn(2, 5, 32, dtype=torch.float64)
    context = model.model.context(hidden_BTD)
    merged = GroupedQuery(2).build(model.config, GroupedQuery(2).initialise(parent))
    expected_BTD = model.model.layers[1].subblock_output("attention", hidden_BTD, **context)
    torch.testing.assert_close(merged.subblock_output("attention", hidden_BTD, **context), expected_BTD)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 16, 47])
def test_a_narrower_ffn_keeps_the_best_channels_and_refits(width: int, bias: bool) -> None:
    activation_NI = spread_activations(48)
    parent = subblock(pico_parent(mlp_bias=bias), "ffn", activation_moments(activation_NI))
    start = GatedFFN(width).initialise(parent)
    kept = sorted(parent.channels[:width].tolist())
    assert start.keys() == parent.state.keys()
    for name, tensor in parent.state.items():
        if ".gate_proj." in name or ".up_proj." in name:
            assert torch.equal(start[name], tensor[kept])
        elif name != "mlp.down_proj.weight":
            assert torch.equal(start[name], tensor)
    weight = parent.state["mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(
        start["mlp.down_proj.weight"].numpy(), _lstsq_refit(weight, activation_NI.numpy(), kept), rtol=1e-6, atol=1e-9
    )
    GatedFFN(width).build(parent.config, start)


def _lstsq_refit(weight: np.ndarray, activation: np.ndarray, kept: list[int]) -> np.ndarray:
    """Least squares on the activations, with one row more a channel: its damping, drawing to the parent's weight."""
    rows = np.diag(np.sqrt(RIDGE * (activation**2).sum(0)))[:, kept]
    inputs = np.concatenate([activation[:, kept], rows])
    wanted = np.concatenate([activation @ weight.T, rows @ weight[:, kept].T])
    return np.linalg.lstsq(inputs, wanted, rcond=None)[0].T


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_are_damped_least_squares(bias: bool) -> None:
    input_ND = spread_activations(6)
    output_ND = spread_activations(5).tanh() + input_ND @ torch.randn(6, 5, dtype=torch.float64)
    found, offset = ridge(moments(input_ND, output_ND), bias=bias)
    inputs, outputs = input_ND.numpy(), output_ND.numpy()
    rows = np.diag(np.sqrt(RIDGE * (inputs**2).sum(0)))
    if bias:
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    weight = np.linalg.lstsq(np.concatenate([inputs, rows]), np.concatenate([outputs, np.zeros((6, 5))]), rcond=None)[
        0
    ].T
    np.testing.assert_allclose(found.numpy(), weight, rtol=1e-6, atol=1e-9)
    assert (offset is not None) is bias
    if offset is not None:
        expected = output_ND.numpy().mean(0) - weight @ input_ND.numpy().mean(0)
        np.testing.assert_allclose(offset.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", [LinearAttention(), LinearFFN()], ids=lambda variant: variant.subblock)
def test_linear_variants_recover_a_linear_subblock(variant: LinearAttention | LinearFFN, bias: bool) -> None:
    """Within the damping; as a module, norm included."""
    model = pico_parent(attention_bias=bias, mlp_bias=bias)
    input_ND = torch.randn(4000, 32, dtype=torch.float64) + 0.5
    true_weight = torch.randn(32, 32, dtype=torch.float64)
    offset = 1.0 if bias else 0.0
    parent = subblock(model, variant.subblock, moments(input_ND, input_ND @ true_weight.T + offset))
    layer = variant.build(model.config, variant.initialise(parent))
    hidden_BTD = torch.randn(2, 5, 32, dtype=torch.float64)
    norm = layer.input_layernorm if variant.subblock == "attention" else layer.post_attention_layernorm
    expected_BTD = hidden_BTD + norm(hidden_BTD) @ true_weight.T + offset
    error = (layer(hidden_BTD) - expected_BTD).norm() / (expected_BTD - hidden_BTD).norm()
    assert error < 5 * RIDGE


@pytest.mark.parametrize("bias", [False, True])
def test_a_low_rank_map_is_the_best_of_its_rank(bias: bool) -> None:
    """Eckart and Young on whitened data: least squares on data and damping rows, the fit cut by its own SVD."""
    rank = 5
    input_ND = spread_activations(32)
    output_ND = spread_activations(32, 200).tanh() + input_ND @ torch.randn(32, 32, dtype=torch.float64)
    parent = subblock(pico_parent(mlp_bias=bias), "ffn", moments(input_ND, output_ND))
    start = LowRankFFN(rank).initialise(parent)

    inputs, outputs = input_ND.numpy(), output_ND.numpy()
    rows = np.diag(np.sqrt(RIDGE * (inputs**2).mean(0) * len(inputs)))
    if bias:
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    inputs, outputs = np.concatenate([inputs, rows]), np.concatenate([outputs, np.zeros((32, 32))])
    full = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    basis = np.linalg.svd(inputs @ full, full_matrices=False)[2][:rank]
    found = (start["mlp.expand_proj.weight"] @ start["mlp.reduce_proj.weight"]).numpy()
    np.testing.assert_allclose(found, (full @ basis.T @ basis).T, rtol=1e-5, atol=1e-8 * np.abs(full).max())
    assert start["mlp.reduce_proj.weight"].shape == (rank, 32)
    assert ("mlp.expand_proj.bias" in start) is bias
    if bias:
        expected = output_ND.numpy().mean(0) - found @ input_ND.numpy().mean(0)
        np.testing.assert_allclose(start["mlp.expand_proj.bias"].numpy(), expected, rtol=1e-5, atol=1e-6)
    LowRankFFN(rank).build(parent.config, start)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 5), tokens=st.integers(2, 60), bias=st.booleans())
def test_no_other_map_of_that_rank_is_better(seed: int, rank: int, tokens: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    input_ND = torch.randn(tokens, 6, generator=generator, dtype=torch.float64) * 10 ** torch.linspace(-2, 2, 6)
    output_ND = input_ND.tanh() @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 1
    statistics = moments(input_ND, output_ND)
    damped = statistics | {
        "input_second_moment": statistics["input_second_moment"]
        + torch.diag(damping(statistics["input_second_moment"]))
    }
    expand, reduce, offset = reduced_rank(statistics, rank, bias=bias)
    best = linear_loss(damped, expand @ reduce, offset)
    for scale in (1e-3, 1e-1):
        other = (expand + scale * torch.randn(expand.shape, generator=generator, dtype=torch.float64)) @ (
            reduce * (1 + scale * torch.randn(reduce.shape, generator=generator, dtype=torch.float64))
        )
        assert best <= linear_loss(damped, other, offset) + 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_the_papers_starts_are_weights_alone(bias: bool) -> None:
    """Slices; and W_down W_up, which is the FFN itself where the gate is 1."""
    parent = subblock(pico_parent(mlp_bias=bias), "ffn", activation_moments(spread_activations(48)))
    parent = replace(parent, start=Start(method="paper"))
    state = parent.state
    narrow, kept = GatedFFN(16).initialise(parent), parent.channels[:16].sort().values
    assert torch.equal(narrow["mlp.down_proj.weight"], state["mlp.down_proj.weight"][:, kept])
    assert torch.equal(narrow["mlp.gate_proj.weight"], state["mlp.gate_proj.weight"][kept])

    hidden_ND = torch.randn(7, 32, dtype=torch.float64)
    up_NI = linear(hidden_ND, state["mlp.up_proj.weight"], state.get("mlp.up_proj.bias"))
    expected_ND = linear(up_NI, state["mlp.down_proj.weight"], state.get("mlp.down_proj.bias"))
    start = LinearFFN().initialise(parent)
    found_ND = linear(hidden_ND, start["mlp.linear_mlp.weight"], start.get("mlp.linear_mlp.bias"))
    torch.testing.assert_close(found_ND, expected_ND)
    low = LowRankFFN(31).initialise(parent)
    found_ND = LowRankFFN(31).build(parent.config, low).mlp(hidden_ND)
    lost = torch.linalg.svdvals(start["mlp.linear_mlp.weight"])[-1]
    assert (found_ND - expected_ND).norm() <= lost * hidden_ND.norm() * (1 + 1e-9)
    assert all(map(torch.equal, [s[f"{_NORM}weight"] for s in (narrow, start, low)], [state[f"{_NORM}weight"]] * 3))


def test_nothing_starts_with_nothing() -> None:
    assert NoAttention().initialise(subblock(pico_parent(), "attention", {})) == {}
    assert NoFFN().initialise(subblock(pico_parent(), "ffn", {})) == {}


def test_the_dtype_is_the_parents() -> None:
    model = pico_parent().to(torch.bfloat16)
    ffn = subblock(model, "ffn", activation_moments(spread_activations(48)) | moments(*torch.randn(2, 90, 32)))
    attention = subblock(model, "attention", moments(*torch.randn(2, 90, 32)))
    variants = (GatedFFN(16), LowRankFFN(4), LinearFFN())
    parents = (ffn, replace(ffn, start=Start(method="paper")))
    starts = [variant.initialise(parent) for variant in variants for parent in parents]
    starts += [GroupedQuery(2).initialise(attention), LinearAttention().initialise(attention)]
    assert {tensor.dtype for start in starts for tensor in start.values()} == {torch.bfloat16}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 40), dead=st.integers(0, 3))
def test_a_wider_refit_is_never_worse(seed: int, tokens: int, dead: int) -> None:
    """Whatever calibration saw: fewer tokens than channels, scales far apart, channels that are never active."""
    channels = 12
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (6 * torch.rand(channels, generator=generator, dtype=torch.float64) - 3)
    activation_NI = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) * scales
    activation_NI[:, :dead] = 0
    weight = torch.randn(5, channels, generator=generator, dtype=torch.float64)
    second_moment = activation_NI.T @ activation_NI / tokens
    damped = second_moment + torch.diag(damping(second_moment))
    ranking = torch.randperm(channels, generator=generator)

    nothing_kept = _error(weight, second_moment)
    previous = _error(weight, damped)
    for width in range(1, channels + 1):
        kept = ranking[:width]
        left = weight.clone()
        left[:, kept] -= least_squares_update(weight, second_moment, kept)
        # The refit is the optimum under the damped moment; there, more channels can only help.
        error = _error(left, damped)
        assert error <= previous + 1e-9 * nothing_kept
        previous = error
        # On the moments themselves, what damping costs is never more than what plain slicing would.
        sliced = weight.clone()
        sliced[:, kept] = 0
        assert _error(left, second_moment) <= _error(sliced, second_moment) + 1e-9 * nothing_kept
    assert torch.equal(left, torch.zeros_like(left))


@pytest.mark.parametrize("channels", ["iterative", "independent"])
def test_the_error_on_the_calibration_moments_falls_with_the_width(
    channels: Literal["iterative", "independent"],
) -> None:
    parent = subblock(pico_parent(), "ffn", activation_moments(spread_activations(48)))
    parent = replace(parent, start=Start(channels=channels))
    weight, second_moment = parent.state["mlp.down_proj.weight"], parent.statistics["activation_second_moment"]
    ranking = parent.channels
    errors = []
    for width in range(0, 49, 4):
        left = weight.clone()
        left[:, ranking[:width]] -= least_squares_update(weight, second_moment, ranking[:width])
        errors.append(_error(left, second_moment))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def _error(left: Tensor, second_moment: Tensor) -> float:
    """E||left a||^2."""
    return float(torch.trace(left @ second_moment @ left.T))


def test_an_input_that_is_never_active_gets_no_weight() -> None:
    input_ND = spread_activations(6)
    input_ND[:, 2] = 0
    weight, _ = ridge(moments(input_ND, spread_activations(5)), bias=False)
    assert weight.isfinite().all()
    assert weight[:, 2].abs().max() == 0
    nothing, _ = ridge(moments(torch.zeros(9, 6), torch.zeros(9, 5)), bias=True)
    assert nothing.abs().max() == 0


def test_an_input_that_is_constant_leaves_its_work_to_the_bias() -> None:
    """Centring leaves nothing of it but rounding error, from which no weight comes."""
    input_ND = spread_activations(6).float()
    input_ND[:, 2] = 1234.5
    output_ND = spread_activations(5).float()
    weight, _ = ridge(moments(input_ND, output_ND), bias=True)
    largest = (weight[:, 2] * 1234.5).abs().max()
    assert largest < 1e-3 * output_ND.abs().max()
