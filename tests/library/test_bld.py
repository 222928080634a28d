"""What BLD trains on, and that variants neither share weights nor disturb each other."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.library.conftest import Killed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle.artefacts import LibraryIndex
from puzzle.data import TokenData
from puzzle.distributed.state import SaveTimer
from puzzle.library import Library, Statistics, Student, build_library
from puzzle.library.library import _nested
from puzzle.parents import Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, read_tensors
from puzzle.streams import LayerPass
from puzzle.training import schedule
from puzzle.variants import BlockVariant, LayerSpace, Space, Start, State, parse_variant
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery

Build = Callable[..., Library]


@pytest.fixture
def build(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics
) -> Build:
    """A library of a space in a run folder of its own, with other settings than the pico recipe's."""

    def make(
        space: Space,
        *,
        library: dict[str, Any] | None = None,
        execution: ExecutionSettings | None = None,
        precision: str = "float32",
        coupled: bool = False,
        data: TokenData = pico_data,
    ) -> Library:
        recipe = pico_run.recipe
        settings = {
            "library": recipe.library.model_copy(update=library or {}),
            "execution": execution or recipe.execution,
            "precision": precision,
        }
        recipe = recipe.model_copy(update=settings)
        run = replace(pico_run, path=tmp_path, recipe=recipe)
        return build_library(run, pico_parent, data, pico_statistics, space, coupled=coupled)

    return make


def narrow(library: Library, attention: tuple[str, ...], ffn: tuple[str, ...]) -> Space:
    """The parent's own and these, in every layer."""
    own = library.parent.architecture.blocks
    return Space(
        tuple(
            LayerSpace(
                (block.attention, *(parse_variant("attention", name) for name in attention)),
                (block.ffn, *(parse_variant("ffn", name) for name in ffn)),
            )
            for block in own
        )
    )


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_library_gives_the_parents_own_weights_for_its_own_variants(
    pico_parent: Parent, pico_library: Library
) -> None:
    block = pico_parent.architecture.blocks[1]
    state = pico_library.block_state(1, block)
    expected = pico_parent.layer_state(1)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_variants_have_their_own_sizes(pico_library: Library) -> None:
    narrow = pico_library.state(0, GatedFFN(16))
    assert narrow["mlp.gate_proj.weight"].shape == (16, 32)
    assert narrow["mlp.down_proj.weight"].shape == (32, 16)
    assert pico_library.state(0, GroupedQuery(2))["self_attn.k_proj.weight"].shape == (2 * 12, 32)


def test_a_variant_trains_to_the_same_weights_alone_and_among_others(
    build: Build, pico_space: Space, pico_library: Library
) -> None:
    alone = Space(
        tuple(
            LayerSpace(layer.attention[:2] if i == 2 else layer.attention[:1], layer.ffn[:1])
            for i, layer in enumerate(pico_space.layers)
        )
    )
    library = build(alone)
    assert [row.variant for row in library.index.rows] == ["kv2"]
    assert_equal(library.state(2, GroupedQuery(2)), pico_library.state(2, GroupedQuery(2)))


def test_a_streamed_parent_gives_the_same_library(build: Build, pico_library: Library) -> None:
    space = narrow(pico_library, ("kv2", "linear"), ("w16",))
    streamed = build(space, execution=ExecutionSettings(memory="1B"))
    for row in streamed.index.rows:
        expected = pico_library.index.row(row.layer, row.subblock, row.variant)
        assert (row.initial_loss, row.loss) == (expected.initial_loss, expected.loss)
        variant = parse_variant(row.subblock, row.variant)  # type: ignore[arg-type]
        assert_equal(streamed.state(row.layer, variant), pico_library.state(row.layer, variant))
    assert not list(streamed.root.rglob("activations"))


def files_of(library: Library) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (library.root / "variants").iterdir()}


@pytest.mark.parametrize("coupled", [False, True])
def test_nothing_is_trained_twice(build: Build, pico_library: Library, coupled: bool) -> None:
    settings = {"tokens": 256}
    first = build(narrow(pico_library, ("kv2",), ("w16",)), library=settings, coupled=coupled)
    before = files_of(first)
    second = build(narrow(pico_library, ("kv2",), ("w32", "w16")), library=settings, coupled=coupled)
    after = files_of(second)
    assert before.items() <= after.items()
    assert set(first.index.rows) <= set(second.index.rows)
    new = 3 if coupled else 1  # w32, and with either attention
    assert len(second.index.rows) == len(first.index.rows) + 4 * new


@pytest.mark.parametrize("memory", [None, "1B"])
def test_a_library_killed_again_and_again_is_the_same(
    memory: str | None,
    build: Build,
    cut_after: Callable[[int], TokenData],
    pico_library: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SaveTimer, "due", lambda _: True)
    monkeypatch.setattr("puzzle.training.steps_between_looks", lambda _: 1)
    space, kills, library = narrow(pico_library, ("kv2",), ("w16",)), 0, None
    while library is None:
        try:
            library = build(space, data=cut_after(15 + 5 * kills), execution=ExecutionSettings(memory=memory))
        except Killed:
            kills += 1
            assert kills < 99
    assert kills > 3
    for row in library.index.rows:
        assert replace(row, file="") == replace(pico_library.index.row(row.layer, row.subblock, row.variant), file="")
        variant = parse_variant(row.subblock, row.variant)  # type: ignore[arg-type]
        assert_equal(library.state(row.layer, variant), pico_library.state(row.layer, variant))
    assert not list(library.root.rglob("training*"))


def test_training_is_a_plain_loop_from_merged_heads(
    build: Build, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, pico_library: Library
) -> None:
    """AdamW on the transformers' own modules, one variant alone."""
    steps, rate = 60, 1e-2  # with which it gets ahead of the closed form
    settings = {"least_squares": False, "tokens": steps * 8 * 32, "learning_rate": rate}
    library = build(narrow(pico_library, ("kv2",), ()), library=settings)
    own = pico_statistics.parent_subblock(pico_parent, Start(), torch.device("cpu"), 0, "attention")
    parent = AutoModelForCausalLM.from_pretrained(pico_parent.path)
    config = copy.deepcopy(parent.config)
    config.num_key_value_heads = 2
    student, state = LlamaForCausalLM(config), GroupedQuery(2).initialise(own)
    student.model.embed_tokens = parent.model.embed_tokens
    layer = student.model.layers[0]
    layer.load_state_dict(state, strict=False)
    outputs: list[Tensor] = []
    for model in (parent, student):
        model.model.layers[0].self_attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    parameters = [layer.get_parameter(name) for name in state]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        outputs.clear()
        for model in (parent, student):
            model(pico_data.training_batch(step, 8, 0)[:, :-1])
        target_BTD, output_BTD = outputs
        loss = (output_BTD - target_BTD.detach()).square().mean() / own.statistics["output_power"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps=steps, warmup=0.05)
        optimizer.step()
    row = library.index.row(0, "attention", "kv2")
    assert row.loss < row.initial_loss
    for name, value in library.state(0, GroupedQuery(2)).items():
        torch.testing.assert_close(value, layer.get_parameter(name).detach(), rtol=1e-3, atol=2e-5)


def test_attention_never_ends_behind_its_closed_form(build: Build, pico_parent: Parent, pico_library: Library) -> None:
    """It trains from merged heads, but if nothing is learned, the best there is is their least-squares update."""
    library = build(narrow(pico_library, ("kv2",), ()), library={"least_squares": False, "learning_rate": 1e-12})
    for layer in range(4):
        row, own = library.index.row(layer, "attention", "kv2"), pico_parent.layer_state(layer)
        assert row.loss == row.initial_loss == pico_library.index.row(layer, "attention", "kv2").initial_loss
        projection = library.state(layer, GroupedQuery(2))["self_attn.o_proj.weight"]
        assert not torch.allclose(projection, own["self_attn.o_proj.weight"])


def test_what_diverges_stops_alone(
    build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = Student.loss

    def poisoned(self: Student, seen: LayerPass) -> Tensor:
        mine = self.name == "1.ffn.w16" and torch.is_grad_enabled()
        return loss(self, seen) * (torch.nan if mine else 1.0)

    monkeypatch.setattr(Student, "loss", poisoned)
    library = build(narrow(pico_library, ("kv2",), ("w16",)))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: BLD of layers 0-3: 1.ffn.w16 diverged and stopped; lower library.learning_rate"]
    for row in library.index.rows:
        expected = pico_library.index.row(row.layer, row.subblock, row.variant)
        if (row.layer, row.variant) == (1, "w16"):
            assert row.loss <= row.initial_loss == expected.initial_loss
            assert expected.loss < row.loss
        else:
            assert row.loss == expected.loss


def test_training_does_not_wait_for_the_device_every_step(build: Build, pico_library: Library) -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    space, counts = narrow(pico_library, (), ("w16",)), []
    for steps in (16, 48):
        with Waits() as waits:
            build(space, library={"tokens": steps * 8 * 32, "least_squares": False})
        counts.append(waits.count)
    assert counts[1] - counts[0] <= (48 - 16) // 4


def test_bfloat16_is_for_products_alone(build: Build, pico_library: Library) -> None:
    library = build(narrow(pico_library, ("kv2",), ("w16",)), precision="bfloat16")
    for row in library.index.rows:
        assert row.loss < row.initial_loss
        assert {value.dtype for value in read_tensors(library.root / row.file).values()} == {torch.float32}
        expected = pico_library.index.row(row.layer, row.subblock, row.variant)
        assert row.loss != expected.loss
        assert row.loss == pytest.approx(expected.loss, rel=0.05)


def test_untrained_variants_stay_as_they_start(build: Build, pico_library: Library) -> None:
    library = build(narrow(pico_library, ("kv2",), ("w16",)), library={"tokens": 0})
    assert all(row.loss == row.initial_loss and row.trained_tokens == 0 for row in library.index.rows)


def test_papers_starts_are_worse_and_its_linear_maps_are_trained(build: Build, pico_library: Library) -> None:
    paper = build(
        narrow(pico_library, ("linear",), ("w16", "linear")), library={"start": "paper", "least_squares": False}
    )
    for row in paper.index.rows:
        assert row.trained_tokens
        assert row.loss < row.initial_loss
        assert pico_library.index.row(row.layer, row.subblock, row.variant).initial_loss < row.initial_loss


def test_losses_on_the_blocks_output_are_of_another_scale(
    build: Build, pico_library: Library, pico_statistics: Statistics
) -> None:
    """An FFN's error is the same, only its denominator differs."""
    space = narrow(pico_library, ("kv2", "none"), ("w16", "none"))
    blocks = build(space, library={"loss": "block", "tokens": 0})
    for layer in range(4):
        output_power = pico_statistics.subblock(layer, "ffn")["output_power"]
        ratio = float(output_power / pico_statistics.layer(layer)["block_power"])
        for name in ("w16", "none"):
            own = pico_library.index.row(layer, "ffn", name).initial_loss
            # Of held-out text, where both powers are a little different.
            assert blocks.index.row(layer, "ffn", name).loss == pytest.approx(ratio * own, rel=0.1)
        assert 0 < blocks.index.row(layer, "attention", "kv2").loss < blocks.index.row(layer, "attention", "none").loss
    trained = build(space, library={"loss": "block"})
    assert all(row.loss < row.initial_loss for row in trained.index.rows if row.trained_tokens)


def test_coupled_blocks_are_better_than_their_subblocks(
    build: Build, pico_library: Library, pico_parent: Parent, pico_data: TokenData
) -> None:
    space = narrow(pico_library, ("kv1",), ("w16",))
    library = build(space, coupled=True)
    blocks = [row for row in library.index.rows if row.subblock == "block"]
    assert {row.variant for row in blocks} == {"kv4+w16", "kv1+w64", "kv1+w16"}
    assert len(blocks) == 4 * 3
    assert all(row.loss <= row.initial_loss for row in blocks)
    assert sum(row.loss < row.initial_loss for row in blocks) > 6
    block = BlockVariant.parse("kv1+w16")
    subblocks = library.state(0, block.attention) | library.state(0, block.ffn)
    assert any(not torch.equal(subblocks[name], tensor) for name, tensor in library.block_state(0, block).items())


def test_a_wider_variant_takes_over_a_better_narrower_one(pico_run: Run, pico_library: Library) -> None:
    wide, slim = pico_library.index.row(0, "ffn", "w32"), pico_library.index.row(0, "ffn", "w16")
    rows = [replace(wide, loss=0.9), replace(slim, loss=0.5)]
    nested = _nested(pico_run.path, pico_library.parent, rows)
    assert nested[0] == replace(wide, loss=0.5, file=slim.file, widened_from="w16")
    assert nested[1] == rows[1]
    library = replace(pico_library, index=LibraryIndex(rows=tuple(nested)))
    state = library.state(0, GatedFFN(32))
    assert_equal(
        {k: v[:16] for k, v in state.items() if "gate" in k},
        {k: v for k, v in library.state(0, GatedFFN(16)).items() if "gate" in k},
    )
    assert state["mlp.down_proj.weight"].shape == (32, 32)
