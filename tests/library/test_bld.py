"""What BLD trains on, and that variants neither share weights nor disturb each other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import puzzle.library.bld
import puzzle.runs.files
import puzzle.training
from puzzle.artefacts import LibraryIndex
from puzzle.data import TokenData
from puzzle.library import Library, Statistics, build_library
from puzzle.library.coupled import CoupledStudent
from puzzle.library.library import _nested
from puzzle.library.students import SubblockStudent
from puzzle.parents import LayerPass, Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, read_tensors
from puzzle.training import learning_rate
from puzzle.variants import (
    BlockVariant,
    GatedFFN,
    GroupedQuery,
    LayerSpace,
    ParentSubblock,
    Space,
    State,
    parse_variant,
)
from puzzle.variants.kinds.grouped_query import merge_heads

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
    ) -> Library:
        recipe = pico_run.recipe
        settings = {
            "library": recipe.library.model_copy(update=library or {}),
            "execution": execution or recipe.execution,
            "precision": precision,
        }
        recipe = recipe.model_copy(update=settings)
        run = replace(pico_run, path=tmp_path, recipe=recipe, _used={})
        return build_library(run, pico_parent, pico_data, pico_statistics, space, coupled=coupled)

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


def test_nothing_is_trained_twice(build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    build(narrow(pico_library, ("kv2",), ("w16",)))
    built: list[str] = []
    initialise = GatedFFN.initialise

    def counted(self: GatedFFN, parent: ParentSubblock) -> State:
        built.append(self.name)
        return initialise(self, parent)

    monkeypatch.setattr(GatedFFN, "initialise", counted)
    wider = build(narrow(pico_library, ("kv2", "kv1"), ("w32", "w16")))
    assert built == ["w32"] * 4
    assert {row.variant for row in wider.index.rows} == {"kv2", "kv1", "w32", "w16"}


class Killed(BaseException):
    pass


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let so many more files be written, training state after every step among them, and nothing afterwards."""
    write, left = puzzle.runs.files.write_atomically, [0]
    monkeypatch.setattr(puzzle.training, "CHECKPOINT_INTERVAL_S", 0.0)

    def counted(path: Path, content: Callable[[Path], object]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(path, content)

    def set_left(files: int) -> None:
        left[0] = files

    monkeypatch.setattr(puzzle.runs.files, "write_atomically", counted)
    return set_left


@pytest.mark.parametrize(("memory", "files"), [(None, 6), ("1B", 61)])
def test_a_library_killed_between_any_files_is_the_same(
    memory: str | None, files: int, build: Build, pico_library: Library, kill_after: Callable[[int], None]
) -> None:
    kills, library = 0, None
    while library is None:
        kill_after(files + kills % 5)  # so that it falls between other files each time
        try:
            library = build(narrow(pico_library, ("kv2",), ("w16",)), execution=ExecutionSettings(memory=memory))
        except Killed:
            kills += 1
            assert kills < 99
    assert kills > 1
    for row in library.index.rows:
        assert replace(row, file="") == replace(pico_library.index.row(row.layer, row.subblock, row.variant), file="")
        variant = parse_variant(row.subblock, row.variant)  # type: ignore[arg-type]
        assert_equal(library.state(row.layer, variant), pico_library.state(row.layer, variant))
    assert not list(library.root.rglob("training*"))


def test_training_goes_on_where_it_stood_with_more_memory_too(
    build: Build, pico_library: Library, kill_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, steps = narrow(pico_library, (), ("w16",)), []

    def noted(step: int, **settings: Any) -> float:
        steps.append(step)
        return learning_rate(step, **settings)

    monkeypatch.setattr(puzzle.library.bld, "learning_rate", noted)
    kill_after(2 + 9)  # the stage's own two, and the state of nine steps
    with pytest.raises(Killed):
        build(space, execution=ExecutionSettings(memory="1B"))
    assert steps == list(range(10))
    steps.clear()
    kill_after(1000)
    build(space)
    assert steps == [*range(9, 16), *range(16)]  # layer 0, then all others together


def test_what_diverges_stops_alone(
    build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = SubblockStudent.losses

    def poisoned(self: SubblockStudent, seen: LayerPass) -> dict[str, Tensor]:
        mine = (self.layer, self.variant.name) == (1, "w16") and torch.is_grad_enabled()
        return {name: loss * (torch.nan if mine else 1.0) for name, loss in losses(self, seen).items()}

    monkeypatch.setattr(SubblockStudent, "losses", poisoned)
    library = build(narrow(pico_library, ("kv2",), ("w16",)))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: BLD of layers 0-3: w16 of layer 1 diverged and keeps its start; lower library.learning_rate"
    ]
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
            build(space, library={"tokens": steps * 8 * 32, "refit": False})
        counts.append(waits.count)
    # Once a pass of the parent, for its attention mask; beside that only now and then.
    assert counts[1] - counts[0] <= (48 - 16) + (48 - 16) // 4


def test_bfloat16_is_for_products_alone(build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    casts: set[bool] = set()
    losses = SubblockStudent.losses

    def noted(self: SubblockStudent, seen: LayerPass) -> dict[str, Tensor]:
        assert seen.entered_BTD.dtype == torch.bfloat16
        if torch.is_grad_enabled():
            casts.add(torch.is_autocast_enabled("cpu"))
        return losses(self, seen)

    monkeypatch.setattr(SubblockStudent, "losses", noted)
    library = build(narrow(pico_library, ("kv2",), ("w16",)), precision="bfloat16")
    assert casts == {True}
    for row in library.index.rows:
        assert row.loss < row.initial_loss
        assert {value.dtype for value in read_tensors(library.root / row.file).values()} == {torch.float32}
        assert row.loss == pytest.approx(pico_library.index.row(row.layer, row.subblock, row.variant).loss, rel=0.05)


def test_attention_trains_from_merged_heads_and_never_ends_behind_its_closed_form(
    build: Build, pico_library: Library, pico_parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = narrow(pico_library, ("kv2",), ())
    begun: dict[int, State] = {}

    def noted(self: Any, students: list[SubblockStudent], steps: int) -> None:
        begun.update({student.layer: student.states()["kv2"] for student in students})

    monkeypatch.setattr(puzzle.library.bld._Flight, "_train", noted)
    library = build(space, library={"refit": False})
    for layer in range(4):
        merged = merge_heads(pico_parent.layer_state(layer)["self_attn.k_proj.weight"], 4, 2)
        assert torch.equal(begun[layer]["self_attn.k_proj.weight"], merged)
        own = pico_parent.layer_state(layer)["self_attn.o_proj.weight"]
        assert torch.equal(begun[layer]["self_attn.o_proj.weight"], own)
        # Nothing was learned, so the closed form is the best there is.
        row = library.index.row(layer, "attention", "kv2")
        assert row.loss == row.initial_loss == pico_library.index.row(layer, "attention", "kv2").initial_loss
        assert not torch.equal(library.state(layer, GroupedQuery(2))["self_attn.o_proj.weight"], own)


def test_untrained_variants_stay_as_they_start(build: Build, pico_library: Library) -> None:
    library = build(narrow(pico_library, ("kv2",), ("w16",)), library={"tokens": 0})
    assert all(row.loss == row.initial_loss and row.trained_tokens == 0 for row in library.index.rows)


def test_papers_starts_are_worse_and_its_linear_maps_are_trained(build: Build, pico_library: Library) -> None:
    paper = build(narrow(pico_library, ("linear",), ("w16", "linear")), library={"start": "paper", "refit": False})
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


def test_elastic_widths_share_their_gates(build: Build, pico_library: Library) -> None:
    library = build(narrow(pico_library, ("kv2",), ("w32", "w16")), library={"ffn": "elastic", "refit": False})
    for layer in range(4):
        wide, slim = library.state(layer, GatedFFN(32)), library.state(layer, GatedFFN(16))
        rows = library.index.row(layer, "ffn", "w32"), library.index.row(layer, "ffn", "w16")
        assert all(row.loss < row.initial_loss for row in rows)
        assert rows[0].loss < rows[1].loss
        assert torch.equal(wide["mlp.gate_proj.weight"][:16], slim["mlp.gate_proj.weight"])


def test_coupled_blocks_are_better_than_their_halves(
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


def test_blocks_are_not_trained_again_for_another_choice_of_them(
    build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokens": 256}
    first = build(narrow(pico_library, ("kv1",), ("w16",)), library=settings, coupled=True)
    trained: list[str] = []
    initialise = CoupledStudent.__init__

    def counted(self: CoupledStudent, layer: int, block: BlockVariant, *args: Any, **kwargs: Any) -> None:
        trained.append(block.name)
        initialise(self, layer, block, *args, **kwargs)

    monkeypatch.setattr(CoupledStudent, "__init__", counted)
    second = build(narrow(pico_library, ("kv1",), ("w16", "none")), library=settings, coupled=True)
    assert trained == ["kv4+none", "kv1+none"] * 4
    assert second.index.row(0, "block", "kv1+w16") == first.index.row(0, "block", "kv1+w16")


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
