"""What students learn, one subblock or a whole block; their least-squares update; and the space for whole blocks."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens

from puzzle.library import Statistics, Student
from puzzle.library.students import update_projections
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run
from puzzle.streams import LayerPass, Stream
from puzzle.variants import BlockVariant, LayerSpace, Space, State, narrow_space, parse_variant
from puzzle.variants.least_squares import RIDGE

CPU = torch.device("cpu")


@pytest.fixture
def seen() -> LayerPass:
    """One layer of a random model on random tokens."""
    model = pico_puzzle("kv4+w32").requires_grad_(False)
    layer, input_BTD = model.model.layers[0], model.embed(random_tokens(2, 5))
    context = model.model.context(input_BTD)
    attention_BTD = layer.subblock_output("attention", input_BTD, **context)
    middle_BTD = input_BTD + attention_BTD
    ffn_BTD = layer.subblock_output("ffn", middle_BTD, **context)
    inputs_BTD, added_BTD = {"attention": input_BTD, "ffn": middle_BTD}, {"attention": attention_BTD, "ffn": ffn_BTD}
    return LayerPass(0, layer, context, inputs_BTD, added_BTD, middle_BTD + ffn_BTD)


def student(seen: LayerPass, block: str, power: float = 0.7, **options: Any) -> tuple[Student, State]:
    """A student of the layer's own weights, as far as the block has them, and these weights."""
    parsed = BlockVariant.parse(block)
    kept = {"self_attn": not parsed.attention.absent, "mlp": not parsed.ffn.absent}
    kept |= {"input_layernorm": kept["self_attn"], "post_attention_layernorm": kept["mlp"]}
    state = {name: value for name, value in seen.layer.state_dict().items() if kept[name.partition(".")[0]]}
    return Student(0, parsed.subblocks, pico_puzzle("kv4+w32").config, state, power, CPU, **options), state


def test_the_parents_own_block_has_no_loss(seen: LayerPass) -> None:
    assert float(student(seen, "kv4+w32")[0].loss(seen).detach()) < 1e-12


@pytest.mark.parametrize(("loss", "power"), [("subblock", 0.7), ("block", 3.0)])
def test_the_loss_is_that_of_the_blocks_output(seen: LayerPass, loss: str, power: float) -> None:
    """Both kinds have the same error; they differ in what it is relative to."""
    ffn_alone, input_BTD = student(seen, "none+w32", power, loss=loss)[0], seen.inputs_BTD["attention"]
    output_BTD = input_BTD + seen.layer.subblock_output("ffn", input_BTD, **seen.context)
    expected = (output_BTD - seen.output_BTD).square().mean() / power
    torch.testing.assert_close(ffn_alone.loss(seen), expected)
    learnt_BTD = ffn_alone.target(seen) + (input_BTD if loss == "subblock" else 0)
    torch.testing.assert_close(learnt_BTD, seen.output_BTD)


def test_both_subblocks_are_trained_in_copies(seen: LayerPass) -> None:
    whole, state = student(seen, "kv4+w32")
    assert whole.parameters().keys() == state.keys()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in whole.parameters().values():
            value.add_(0.1)
    whole.loss(seen).backward()
    assert all(value.grad is not None and value.grad.any() for value in whole.parameters().values())
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert all(torch.equal(value, kept[name] + 0.1) for name, value in whole.state().items())


@pytest.fixture
def text(pico_run: Run, pico_parent: Parent) -> list[LayerPass]:
    stream = Stream(pico_run, pico_parent, pico_run.path / "unused")
    batches = [random_tokens(4, 24, seed) for seed in range(3)]
    return [seen for batch in batches for seen in stream.through(range(4), stream.embed(batch))]


@pytest.fixture
def students(pico_parent: Parent, pico_statistics: Statistics) -> list[Student]:
    own = pico_statistics.parent_subblock(pico_parent, LibrarySettings(), CPU, 2, "attention")
    variants = [parse_variant("attention", name) for name in ("kv2", "kv1")]
    return [Student(2, [each], pico_parent.config, each.initialise(own), 1.0, CPU) for each in variants]


def projection(student: Student) -> torch.Tensor:
    return student.state()["self_attn.o_proj.weight"]


def test_a_projection_whose_optimum_is_not_finite_stays(students: list[Student], text: list[LayerPass]) -> None:
    with torch.no_grad():
        students[0].parameters()["self_attn.v_proj.weight"].fill_(torch.nan)
    before = [projection(student) for student in students]
    update_projections(students, lambda: text, 10**9)
    assert torch.equal(projection(students[0]), before[0])
    assert not torch.equal(projection(students[1]), before[1])


@pytest.mark.parametrize("memory_bytes", [1, 10**9], ids=["one at a time", "together"])
def test_the_update_is_damped_least_squares(memory_bytes: int, students: list[Student], text: list[LayerPass]) -> None:
    expected = []
    seen = [each for each in text if each.index == 2]
    for student in students:
        with torch.no_grad():
            inputs = [student.projection_input(each).flatten(0, 1) for each in seen]
        a = torch.cat(inputs).double().numpy()
        y = torch.cat([each.added_BTD["attention"].flatten(0, 1) for each in seen]).double().numpy()
        before = projection(student).double().numpy()
        rows = np.diag(np.sqrt(RIDGE * (a**2).sum(0)))
        left = np.concatenate([a, rows])
        expected.append(np.linalg.lstsq(left, np.concatenate([y, rows @ before.T]), rcond=None)[0].T)
    update_projections(students, lambda: text, memory_bytes)
    for student, weight in zip(students, expected, strict=True):
        np.testing.assert_allclose(projection(student).numpy(), weight, rtol=1e-3, atol=1e-4)  # float32 products


SOLUTIONS = [("kv4+w32", "kv4+none"), ("kv2+w32", "kv4+none"), ("kv2+w16", "kv4+w16"), ("none+w8", "kv4+w8")]


@pytest.mark.parametrize(
    ("keep", "first", "second"),
    [
        # Where uses are equal, the first in the space is taken; the parent's own is there, used or not.
        (1, "kv4 kv2 w64 w32", "kv4 kv1 w64 w8 none"),
        (2, "kv4 kv2 w64 w32 w16", "kv4 kv2 kv1 w64 w16 w8 none"),
        (3, "kv4 kv2 none w64 w32 w16 w8", "kv4 kv2 kv1 w64 w16 w8 none"),
        (9, "kv4 kv2 kv1 none w64 w32 w16 w8 none", "kv4 kv2 kv1 none w64 w32 w16 w8 none"),
    ],
)
def test_the_narrowed_space_keeps_what_is_used_most(keep: int, first: str, second: str) -> None:
    attention = tuple(parse_variant("attention", name) for name in ("kv4", "kv2", "kv1", "none"))
    ffn = tuple(parse_variant("ffn", name) for name in ("w64", "w32", "w16", "w8", "none"))
    space = Space((LayerSpace(attention, ffn),) * 2)
    narrowed = narrow_space(space, SOLUTIONS, keep, always=("kv4+w64", "kv1+w8"))
    found = [" ".join(variant.name for variant in (*layer.attention, *layer.ffn)) for layer in narrowed.layers]
    assert found == [first, second]
