"""The elastic student: its widths start and end as ordinary FFNs, and its gradients are those of a plain one."""

import dataclasses

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import Tensor
from torch.nn.functional import linear, silu

from puzzle.data import TokenData
from puzzle.library import Statistics, build_library
from puzzle.library.elastic import ElasticStudent
from puzzle.library.students import SubblockStudent
from puzzle.modeling import PuzzleConfig
from puzzle.parents import LayerPass, Parent
from puzzle.runs import Run
from puzzle.variants import GatedFFN, LayerSpace, Space, State

WIDTHS = [GatedFFN(24), GatedFFN(8), GatedFFN(16)]  # in no order
POWER = 0.7
CPU = torch.device("cpu")


def layer_pass(bias: bool) -> tuple[PuzzleConfig, State, LayerPass]:
    """One layer of a random model on random tokens, with its FFN's tensors."""
    model = pico_puzzle("kv4+w32", mlp_bias=bias).requires_grad_(False)
    layer = model.model.layers[0]
    entered_BTD = model.model.embed_tokens(random_tokens(2, 5))
    context = model.model.context(entered_BTD)
    attention_BTD = layer.attention_contribution(entered_BTD, **context)
    middle_BTD = entered_BTD + attention_BTD
    ffn_BTD = layer.ffn_contribution(middle_BTD)
    seen = LayerPass(
        index=0,
        layer=layer,
        context=context,
        entered_BTD=entered_BTD,
        attention_BTD=attention_BTD,
        middle_BTD=middle_BTD,
        ffn_BTD=ffn_BTD,
        left_BTD=middle_BTD + ffn_BTD,
    )
    names = ("post_attention_layernorm.", "mlp.")
    return model.config, {k: v for k, v in layer.state_dict().items() if k.startswith(names)}, seen


def starts_of(own: State) -> dict[str, State]:
    """Nested channels of a random ranking in the parent's order, and a down projection of its own for each width."""
    generator = torch.Generator().manual_seed(3)
    ranking = torch.randperm(32, generator=generator)
    starts = {}
    for width in WIDTHS:
        kept = ranking[: width.intermediate_size].sort().values
        state = {name: value[kept] if "gate" in name or "up" in name else value for name, value in own.items()}
        down = own["mlp.down_proj.weight"][:, kept]
        state["mlp.down_proj.weight"] = down + 0.1 * torch.randn(down.shape, generator=generator)
        starts[width.name] = state
    return starts


def independent_losses(config: PuzzleConfig, states: dict[str, State], seen: LayerPass) -> dict[str, Tensor]:
    students = [SubblockStudent(0, width, config, states[width.name], POWER, CPU) for width in WIDTHS]
    return {name: loss for student in students for name, loss in student.losses(seen).items()}


@pytest.mark.parametrize("bias", [False, True])
def test_every_width_starts_as_it_would_alone(bias: bool) -> None:
    config, own, seen = layer_pass(bias)
    starts = starts_of(own)
    student = ElasticStudent(0, WIDTHS, config, starts, POWER, CPU)
    assert student.variants == ("w24", "w8", "w16")
    torch.testing.assert_close(student.losses(seen), independent_losses(config, starts, seen))
    for name, state in student.states().items():
        assert state.keys() == starts[name].keys()
        # The same channels in another order, bit for bit.
        for row in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            assert sorted(state[row].tolist()) == sorted(starts[name][row].tolist())
        columns = (state["mlp.down_proj.weight"].T, starts[name]["mlp.down_proj.weight"].T)
        assert sorted(columns[0].tolist()) == sorted(columns[1].tolist())


@pytest.mark.parametrize("bias", [False, True])
def test_after_training_the_states_are_ordinary_ffns_with_the_same_losses(bias: bool) -> None:
    config, own, seen = layer_pass(bias)
    starts = starts_of(own)
    student = ElasticStudent(0, WIDTHS, config, starts, POWER, CPU)
    before = student.losses(seen)
    optimizer = torch.optim.AdamW(student.parameters().values(), lr=3e-3)
    for _ in range(10):
        torch.stack(list(student.losses(seen).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = student.losses(seen)
    assert all(after[name] < before[name] for name in before)
    torch.testing.assert_close(independent_losses(config, student.states(), seen), after)
    fresh = independent_losses(config, starts_of(own), seen)
    torch.testing.assert_close(fresh, before, msg="training must not reach into the starts")


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_a_plain_implementation(bias: bool) -> None:
    config, own, seen = layer_pass(bias)
    student = ElasticStudent(0, WIDTHS, config, starts_of(own), POWER, CPU)
    parameters = student.parameters()
    plain = {name: value.detach().clone().requires_grad_(True) for name, value in parameters.items()}
    torch.stack(list(student.losses(seen).values())).sum().backward()

    x_BTD = seen.middle_BTD
    scale_BT1 = (x_BTD.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    h_BTD = x_BTD * scale_BT1 * plain["post_attention_layernorm.weight"]
    gate, up = (linear(h_BTD, plain[f"mlp.{n}_proj.weight"], plain.get(f"mlp.{n}_proj.bias")) for n in ("gate", "up"))
    a_BTI = silu(gate) * up
    total = torch.zeros(())
    for w in (8, 16, 24):
        output_BTD = a_BTI[..., :w] @ plain[f"mlp.down_proj.w{w}.weight"].T
        if bias:
            output_BTD = output_BTD + plain[f"mlp.down_proj.w{w}.bias"]
        total = total + (output_BTD - seen.ffn_BTD).square().mean() / POWER
    total.backward()
    assert len(parameters) == (6 if not bias else 11)
    torch.testing.assert_close(
        {name: value.grad for name, value in parameters.items()}, {name: value.grad for name, value in plain.items()}
    )


def test_the_projections_take_the_first_channels() -> None:
    config, own, seen = layer_pass(bias=False)
    student = ElasticStudent(0, WIDTHS, config, starts_of(own), POWER, CPU)
    losses, inputs = student.losses(seen), student.projection_inputs(seen)
    for name, projection in student.projections().items():
        assert inputs[name].shape[-1] == projection.in_features == int(name[1:])
        error_BTD = projection(inputs[name]) - seen.ffn_BTD
        torch.testing.assert_close(error_BTD.square().mean() / POWER, losses[name])


def test_widths_that_do_not_nest_are_a_bug() -> None:
    config, own, _ = layer_pass(bias=False)
    starts = starts_of(own)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        starts["w8"][name] = own[name][torch.arange(8).flip(0)]
    with pytest.raises(AssertionError, match="are not among a wider one's"):
        ElasticStudent(0, WIDTHS, config, starts, POWER, CPU)


def test_a_library_of_elastic_widths(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, pico_space: Space
) -> None:
    settings = pico_run.recipe.library.model_copy(update={"ffn": "elastic"})
    run = dataclasses.replace(pico_run, recipe=pico_run.recipe.model_copy(update={"library": settings}))
    widths = (GatedFFN(64), GatedFFN(32), GatedFFN(16))
    layers = [LayerSpace(layer.attention[:1], layer.ffn[:1]) for layer in pico_space.layers]
    layers[2] = LayerSpace(layers[2].attention, widths)
    library = build_library(run, pico_parent, pico_data, pico_statistics, Space(tuple(layers)))
    rows = {row.variant: row for row in library.index.rows}
    assert rows.keys() == {"w32", "w16"}
    assert all(row.loss < row.initial_loss for row in rows.values())
    assert rows["w32"].loss < rows["w16"].loss
    assert library.state(2, widths[2])["mlp.down_proj.weight"].shape == (32, 16)
