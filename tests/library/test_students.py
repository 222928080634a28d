"""What students learn, one subblock or a whole block; their least-squares update; and the space for whole blocks."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens

from puzzle.library import Statistics, Student
from puzzle.library.students import Stack, _Stacks, update_projections
from puzzle.modeling import PuzzleForCausalLM, puzzle_config, tiny_config
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run
from puzzle.streams import LayerPass, Stream
from puzzle.variants import SUBBLOCKS, BlockVariant, LayerSpace, Space, State, narrow_space, parse_variant
from puzzle.variants.least_squares import RIDGE

CPU = torch.device("cpu")
Text = list[list[LayerPass]]


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


def losses(student: Student, seen: LayerPass) -> torch.Tensor:
    return Stack([student]).losses(seen)


def test_the_parents_own_block_has_no_loss(seen: LayerPass) -> None:
    assert float(losses(student(seen, "kv4+w32")[0], seen).detach()) < 1e-12


@pytest.mark.parametrize(("loss", "power"), [("subblock", 0.7), ("block", 3.0)])
def test_the_loss_is_that_of_the_blocks_output(seen: LayerPass, loss: str, power: float) -> None:
    """Both kinds have the same error; they differ in what it is relative to."""
    ffn_alone, input_BTD = student(seen, "none+w32", power, loss=loss)[0], seen.inputs_BTD["attention"]
    output_BTD = input_BTD + seen.layer.subblock_output("ffn", input_BTD, **seen.context)
    expected = (output_BTD - seen.output_BTD).square().mean() / power
    torch.testing.assert_close(losses(ffn_alone, seen), expected.unsqueeze(0))
    learnt_BTD = ffn_alone.target(seen) + (input_BTD if loss == "subblock" else 0)
    torch.testing.assert_close(learnt_BTD, seen.output_BTD)


def test_both_subblocks_are_trained_in_copies(seen: LayerPass) -> None:
    whole, state = student(seen, "kv4+w32")
    assert whole.parameters().keys() == state.keys()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in whole.parameters().values():
            value.add_(0.1)
    losses(whole, seen).backward()
    assert all(value.grad is not None and value.grad.any() for value in whole.parameters().values())
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert all(torch.equal(value, kept[name] + 0.1) for name, value in whole.state().items())


@pytest.fixture
def text(pico_run: Run, pico_parent: Parent) -> Text:
    stream = Stream(pico_run, pico_parent, pico_run.path / "unused")
    batches = [random_tokens(4, 24, seed) for seed in range(3)]
    return [[*stream.through(range(4), stream.embed(batch))] for batch in batches]


@pytest.fixture
def students(pico_parent: Parent, pico_statistics: Statistics) -> list[Student]:
    own = pico_statistics.parent_subblock(pico_parent, LibrarySettings(), CPU, 2, "attention")
    variants = [parse_variant("attention", name) for name in ("kv2", "kv1")]
    return [Student(2, [each], pico_parent.config, each.initialise(own), 1.0, CPU) for each in variants]


def projection(student: Student) -> torch.Tensor:
    return student.state()["self_attn.o_proj.weight"]


def test_a_projection_whose_optimum_is_not_finite_stays(students: list[Student], text: Text) -> None:
    with torch.no_grad():
        students[0].parameters()["self_attn.v_proj.weight"].fill_(torch.nan)
    before = [projection(student) for student in students]
    update_projections(students, lambda: text, 10**9)
    assert torch.equal(projection(students[0]), before[0])
    assert not torch.equal(projection(students[1]), before[1])


@pytest.mark.parametrize("memory_bytes", [1, 10**9], ids=["one at a time", "together"])
def test_the_update_is_damped_least_squares(memory_bytes: int, students: list[Student], text: Text) -> None:
    expected = []
    seen = [each for passes in text for each in passes if each.index == 2]
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


def students_of(family: str, names: tuple[str, str], device: torch.device) -> tuple[list[Student], list[LayerPass]]:
    """Students of these variants in all layers of a family's small model, and a batch's way through it."""
    model = PuzzleForCausalLM(puzzle_config(tiny_config(family))).eval().requires_grad_(False).to(device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape))
    passes, students = [], []
    hidden_BTD = model.embed(random_tokens(3, 20).to(device))
    context = model.model.context(hidden_BTD[:1])
    for index, layer in enumerate(model.model.layers):
        inputs_BTD, added_BTD = {}, {}
        for which in SUBBLOCKS:
            inputs_BTD[which], added_BTD[which] = hidden_BTD, layer.subblock_output(which, hidden_BTD, **context)
            hidden_BTD = hidden_BTD + added_BTD[which]
        passes.append(LayerPass(index, layer, context, inputs_BTD, added_BTD, hidden_BTD))
        own = [parse_variant(which, name) for which, name in zip(SUBBLOCKS, names, strict=True) if name]
        shapes = {name: shape for each in own for name, shape in each.shapes(model.config).items()}
        state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
        students.append(Student(index, own, model.config, state, 0.5 + index, device))
    return students, passes


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "smollm3", "phi3", "starcoder2", "gpt_oss")
STACKS = {"gemma3_text": [5, 1], "smollm3": [5, 1], "gpt_oss": [1] * 6}
"""Of six layers, where not all are one stack: some have other positions, or weights of no linear map or norm."""
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("names", [("kv1", ""), ("kv2win5s2", ""), ("", "w32"), ("kv1", "w32")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_computes_what_its_students_do(
    family: str, names: tuple[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients, and what enters projections."""
    if family == "gpt_oss" and names[1]:
        pytest.skip("has no dense FFN")
    students, passes = students_of(family, names, torch.device(device))

    def computed(layers: int) -> tuple[dict[str, Any], list[int]]:
        monkeypatch.setattr("puzzle.library.students.layers_at_once", lambda _: layers)
        found, sizes = {}, []
        for stack, seen in _Stacks(students).over(passes):
            sizes.append(len(stack.students))
            losses_L = stack.losses(seen)
            losses_L.sum().backward()
            inputs_LNI = stack.apart(stack.projection_input(seen)) if stack.projection else losses_L
            for student, loss, inputs in zip(stack.students, losses_L, inputs_LNI, strict=True):
                found[student.name] = loss, inputs, {name: value.grad for name, value in student.parameters().items()}
                for value in student.parameters().values():
                    value.grad = None
        return found, sizes

    (alone, ones), (together, sizes) = computed(1), computed(6)
    assert ones == [1] * 6
    assert sizes == ([6] if family == "smollm3" and not names[0] else STACKS.get(family, [6]))
    for student in students:
        torch.testing.assert_close(together[student.name], alone[student.name], rtol=1e-4, atol=1e-6)
