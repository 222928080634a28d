"""What BLD trains on, and that students neither share weights nor disturb each other, however often they are killed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Waits
from tests.library.conftest import CutData, Killed
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.library import Library, Statistics, build_library
from puzzle.library.library import nested
from puzzle.library.students import Stack
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run, read_tensors
from puzzle.streams import LayerPass
from puzzle.training import schedule
from puzzle.variants import BlockVariant, LayerSpace, Space, State, parse_variant

Build = Callable[..., Library]
KV2, W16, W32 = parse_variant("attention", "kv2"), parse_variant("ffn", "w16"), parse_variant("ffn", "w32")


@pytest.fixture
def build(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics
) -> Build:
    """A library of these variants in every layer, such as `kv2 w16`, in a run folder of its own, with these settings of
    `library`.
    """

    def make(
        names: str,
        *,
        layers: range = range(4),
        memory: int | None = None,
        precision: str = "float32",
        coupled: bool = False,
        data: TokenData = pico_data,
        **settings: Any,
    ) -> Library:
        subblocks: list[list[Any]] = []
        for layer, block in enumerate(pico_parent.architecture.blocks):
            some = names.split() if layer in layers else []
            attention = [parse_variant("attention", name) for name in some if name[0] in "kna"]
            ffn = [parse_variant("ffn", name) for name in some if name[0] in "wln"]
            subblocks.append([(block.attention, *attention), (block.ffn, *ffn)])
        recipe = pico_run.recipe
        sections = {
            "library": recipe.library.model_copy(update=settings),
            "execution": recipe.execution.model_copy(update={"memory": memory}),
            "precision": precision,
        }
        run = replace(pico_run, path=tmp_path, recipe=recipe.model_copy(update=sections))
        space = Space(tuple(LayerSpace(*each) for each in subblocks))
        return build_library(run, pico_parent, data, pico_statistics, space, coupled=coupled)

    return make


def row_of(library: Library, row: LibraryRow) -> LibraryRow:
    return library.index.by_key[row.layer, row.subblock, row.variant]


def assert_same(found: Library, expected: Library) -> None:
    """Every loss and weight of `found`, to the last bit."""
    for row in found.index.rows:
        other = row_of(expected, row)
        assert replace(row, file="") == replace(other, file="")
        if row.file:
            assert_equal(read_tensors(found.root / row.file), read_tensors(expected.root / other.file))


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_variant_trains_to_the_same_weights_alone_and_among_others(build: Build, pico_library: Library) -> None:
    library = build("kv2", layers=range(2, 3))
    assert [(row.layer, row.variant) for row in library.index.rows] == [(2, "kv2")]
    assert_same(library, pico_library)


def test_a_streamed_parent_gives_the_same_library(build: Build, pico_library: Library) -> None:
    streamed = build("kv2 w16 linear", memory=1)
    assert len(streamed.index.rows) == 4 * 3
    assert_same(streamed, pico_library)
    assert not list(streamed.root.rglob("activations"))


def test_weights_that_are_damaged_or_gone_are_made_again(build: Build) -> None:
    """Those alone, and the same."""
    library = build("kv2 w16", layers=range(2), tokens=1024)
    files = sorted({library.root / row.file for row in library.index.rows if row.file})
    whole, times = [file.read_bytes() for file in files], [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(bytes([*whole[1][:-1], whole[1][-1] ^ 1]))
    with pytest.raises(PuzzleError) as caught:
        build("kv2 w16", layers=range(2), tokens=1024)
    assert (
        str(caught.value) == f"{files[1]} is damaged; delete {files[1]}, and only that, and run the same command again"
    )
    files[1].unlink()
    assert build("kv2 w16", layers=range(2), tokens=1024).index == library.index
    assert [file.read_bytes() for file in files] == whole
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)].count(False) == 1


@pytest.mark.parametrize("together", [2, 3])
def test_students_of_several_layers_computed_together_are_the_same(
    together: int, build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, up to rounding; of three layers and the one that is left, too."""
    monkeypatch.setattr("puzzle.library.students.layers_at_once", lambda hidden_BTD: together)
    sizes, made = set(), Stack.__init__

    def counted(self: Stack, students: Any) -> None:
        sizes.add(len(students))
        made(self, students)

    monkeypatch.setattr(Stack, "__init__", counted)
    library = build("kv2 w16 linear none")
    assert sizes == {2: {2}, 3: {3, 1}}[together]
    for row in library.index.rows:
        expected = row_of(pico_library, row)
        assert (row.loss, row.initial_loss) == pytest.approx((expected.loss, expected.initial_loss), rel=1e-4)


@pytest.mark.parametrize("coupled", [False, True])
def test_nothing_is_trained_twice(build: Build, coupled: bool) -> None:
    def files() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (first.root / "variants").iterdir()}

    first = build("kv2 w16", tokens=256, coupled=coupled)
    before = files()
    second = build("kv2 w32 w16", tokens=256, coupled=coupled)
    assert before.items() <= files().items()
    assert set(first.index.rows) <= set(second.index.rows)
    new = 3 if coupled else 1  # w32, and with either attention
    assert len(second.index.rows) == len(first.index.rows) + 4 * new


@pytest.mark.usefixtures("saves_every_step")
@pytest.mark.parametrize("memory", [None, 1])
def test_a_library_killed_again_and_again_is_the_same(
    memory: int | None, build: Build, pico_data: TokenData, pico_library: Library
) -> None:
    kills, library = 0, None
    while library is None:
        try:
            library = build("kv2 w16", data=CutData.of(pico_data, 15 + 5 * kills), memory=memory)
        except Killed:
            kills += 1
            assert kills < 99
    assert kills > 3
    assert_same(library, pico_library)
    assert not list(library.root.rglob("training*"))


def test_training_is_a_plain_loop_from_merged_heads(
    build: Build, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics
) -> None:
    """AdamW on the transformers' own modules, one variant alone."""
    steps, rate = 60, 1e-2  # with which it gets ahead of the closed form
    library = build("kv2", least_squares=False, tokens=steps * 8 * 32, learning_rate=rate)
    own = pico_statistics.parent_subblock(pico_parent, LibrarySettings(), torch.device("cpu"), 0, "attention")
    parent = AutoModelForCausalLM.from_pretrained(pico_parent.path)
    config = copy.deepcopy(parent.config)
    config.num_key_value_heads = 2
    student, state = LlamaForCausalLM(config), KV2.initialise(own)
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
    row = library.index.by_key[0, "attention", "kv2"]
    assert row.loss < row.initial_loss
    for name, value in library.state(0, KV2).items():
        torch.testing.assert_close(value, layer.get_parameter(name).detach(), rtol=1e-3, atol=2e-5)


def test_attention_never_ends_behind_its_closed_form(build: Build, pico_parent: Parent, pico_library: Library) -> None:
    """It trains from merged heads, but if nothing is learned, the best there is is their least-squares update."""
    library = build("kv2", least_squares=False, learning_rate=1e-12)
    for row in library.index.rows:
        assert row.loss == row.initial_loss == row_of(pico_library, row).initial_loss
        projection = library.state(row.layer, KV2)["self_attn.o_proj.weight"]
        assert not torch.allclose(projection, pico_parent.layer_state(row.layer)["self_attn.o_proj.weight"])


def test_what_diverges_stops_alone(
    build: Build, pico_library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = Stack.losses

    def poisoned(self: Stack, seen: LayerPass) -> Tensor:
        mine = [each.name == "1.ffn.w16" and torch.is_grad_enabled() for each in self.students]
        return losses(self, seen) * torch.tensor([torch.nan if each else 1.0 for each in mine])

    monkeypatch.setattr(Stack, "losses", poisoned)
    library = build("kv2 w16")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: BLD of layers 0-3: 1.ffn.w16 diverged and stopped; lower library.learning_rate"]
    for row in library.index.rows:
        expected = row_of(pico_library, row)
        if (row.layer, row.variant) == (1, "w16"):
            assert expected.loss < row.loss <= row.initial_loss == expected.initial_loss
        else:
            assert row.loss == expected.loss


def test_training_does_not_wait_for_the_device_every_step(build: Build) -> None:
    counts = []
    for steps in (16, 48):
        with Waits() as waits:
            build("w16", tokens=steps * 8 * 32, least_squares=False)
        counts.append(waits.count)
    assert counts[1] - counts[0] <= (48 - 16) // 4


def test_bfloat16_is_for_products_alone(build: Build, pico_library: Library) -> None:
    library = build("kv2 w16", precision="bfloat16")
    for row in library.index.rows:
        assert row.loss < row.initial_loss
        assert {value.dtype for value in read_tensors(library.root / row.file).values()} == {torch.float32}
        assert row.loss != row_of(pico_library, row).loss
        assert row.loss == pytest.approx(row_of(pico_library, row).loss, rel=0.05)


def test_papers_starts_are_worse_and_its_linear_maps_are_trained(build: Build, pico_library: Library) -> None:
    paper = build("linear w16", start="paper", least_squares=False)
    for row in paper.index.rows:
        assert row.trained_tokens
        assert row.loss < row.initial_loss
        assert row_of(pico_library, row).initial_loss < row.initial_loss


def test_losses_on_the_blocks_output_are_of_another_scale(
    build: Build, pico_library: Library, pico_statistics: Statistics
) -> None:
    """An FFN's error is the same, only its denominator differs; without training, variants stay as they start."""
    blocks = build("kv2 none w16", loss="block", tokens=0)
    assert all(row.loss == row.initial_loss and row.trained_tokens == 0 for row in blocks.index.rows)
    for layer in range(4):
        output_power = pico_statistics.moments(layer, "ffn")["output_power"]
        ratio = float(output_power / pico_statistics.moments(layer)["block_power"])
        for name in ("w16", "none"):
            own = pico_library.index.by_key[layer, "ffn", name].initial_loss
            # Of held-out text, where both powers are a little different.
            assert blocks.index.by_key[layer, "ffn", name].loss == pytest.approx(ratio * own, rel=0.1)
        halved, none = (blocks.index.by_key[layer, "attention", name].loss for name in ("kv2", "none"))
        assert 0 < halved < none
    trained = build("kv2 none w16", loss="block")
    assert all(row.loss < row.initial_loss for row in trained.index.rows if row.trained_tokens)


def test_coupled_blocks_are_better_than_their_subblocks(build: Build) -> None:
    library = build("kv1 w16", coupled=True)
    blocks = [row for row in library.index.rows if row.subblock == "block"]
    assert [row.variant for row in blocks] == ["kv4+w16", "kv1+w64", "kv1+w16"] * 4
    assert all(row.loss <= row.initial_loss for row in blocks)
    assert sum(row.loss < row.initial_loss for row in blocks) > 6
    block = BlockVariant.parse("kv1+w16")
    subblocks = library.state(0, block.attention) | library.state(0, block.ffn)
    assert any(not torch.equal(subblocks[name], tensor) for name, tensor in library.block_state(0, block).items())


def test_a_wider_variant_takes_over_a_better_narrower_one(pico_run: Run, pico_library: Library) -> None:
    wide, slim = (pico_library.index.by_key[0, "ffn", name] for name in ("w32", "w16"))
    rows = nested(pico_run.path, pico_library.parent, [replace(wide, loss=0.9), replace(slim, loss=0.5)])
    assert rows[0] == replace(wide, loss=0.5, file=slim.file, widened_from="w16")
    library = replace(pico_library, index=LibraryIndex(rows=tuple(rows)))
    widened, narrow = library.state(0, W32), library.state(0, W16)
    assert torch.equal(widened["mlp.gate_proj.weight"][:16], narrow["mlp.gate_proj.weight"])
    assert widened["mlp.down_proj.weight"].shape == (32, 32)
