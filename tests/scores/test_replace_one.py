"""Composed blocks scored on a share of the text and by their subblocks on all of it; a parent that is streamed."""

from pathlib import Path

import pytest
import torch
from tests.conftest import Waits
from tests.scores.conftest import Scorer

from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.library import LayerBlocks, Library
from puzzle.parents import Parent
from puzzle.runs import Run, read_tensors
from puzzle.scores.replace_one import SuffixScorer
from puzzle.streams import Stream
from puzzle.variants import BlockVariant

COMPOSED = ("kv1+none", "none+none")
SUBBLOCKS = ("kv4+none", "kv1+w64", "none+w64")


def test_the_estimate_is_the_subblocks_sum_and_what_the_block_has_beyond_it(scored: Scorer, tmp_path: Path) -> None:
    table = scored(composed_share=0.25)
    (file,) = tmp_path.rglob("layer001.safetensors")
    values = read_tensors(file)
    for block in COMPOSED:
        row, (attention, ffn) = table.by_key[1, block], block.split("+")
        for name, own in (("kl", 0.0), ("top1_agreement", 1.0)):
            summed = values[f"{attention}+w64.{name}"] + values[f"kv4+{ffn}.{name}"] - 2 * own
            beyond = values[f"{block}.{name}"] - own - summed[:4]
            assert getattr(row, name) == pytest.approx(own + float(summed.mean() + beyond.mean()))
            if name == "kl":
                assert row.kl_se == pytest.approx(float((summed.var() / 16 + beyond.var() / 4) ** 0.5))
    assert [len(values[f"{block}.kl"]) for block in (*COMPOSED, *SUBBLOCKS)] == [4, 4, 16, 16, 16]
    assert [table.by_key[1, block].sequences for block in (*COMPOSED, *SUBBLOCKS)] == [4, 4, 16, 16, 16]


def test_the_estimate_is_nearer_than_the_first_share_alone(scored: Scorer, tmp_path: Path) -> None:
    full, estimated = scored("full", composed_share=None), scored("estimated", composed_share=0.25)
    errors, alone = [], []
    for layer in range(3):
        (file,) = (tmp_path / "estimated").rglob(f"layer{layer:03d}.safetensors")
        for block in COMPOSED:
            true = full.by_key[layer, block]
            first = float(read_tensors(file)[f"{block}.kl"].mean())
            errors.append(abs(estimated.by_key[layer, block].kl - true.kl) / true.kl)
            alone.append(abs(first - true.kl) / true.kl)
            assert estimated.by_key[layer, block].lm_loss == pytest.approx(true.lm_loss, rel=0.02)
        for block in SUBBLOCKS:
            assert estimated.by_key[layer, block].kl == pytest.approx(full.by_key[layer, block].kl)
    assert sum(errors) < 0.9 * sum(alone)


def test_too_little_text_is_scored_as_a_whole(scored: Scorer) -> None:
    """A share of fewer than four sequences says nothing of its own spread."""
    assert {row.sequences for row in scored(tokens=7 * 32, composed_share=0.25).rows} == {7}
    assert {row.sequences for row in scored(tokens=8 * 32, composed_share=0.25).rows} == {4, 8}


def test_blocks_of_a_layer_wait_for_the_device_once(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> None:
    stream = Stream(pico_run, pico_parent, tmp_path / "activations")
    scorer = SuffixScorer(stream, pico_data, pico_run.recipe.score, batch_tokens=64)
    stream.prepare(4, {scorer.final: scorer.inputs})
    stream.prepare(1, {scorer.scoring: scorer.inputs})
    blocks = [BlockVariant.parse(name) for name in ("kv1+w64", "none+w16")]
    modules = LayerBlocks(pico_library, 1, blocks, stream.model)
    for batches in (range(1), range(8)):
        with torch.no_grad(), Waits() as waits:
            scorer.blocks(modules, blocks, batches)
        assert waits.count == 1


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("memory", [40_000, 150_000])
def test_a_streamed_parent_has_the_same_scores(
    memory: int, share: float | None, scored: Scorer, tmp_path: Path
) -> None:
    resident = scored("resident", composed_share=share)
    streamed = scored("streamed", composed_share=share, memory=memory)
    for row, expected in zip(streamed.rows, resident.rows, strict=True):
        assert (row.layer, row.block, row.sequences) == (expected.layer, expected.block, expected.sequences)
        assert row.kl == pytest.approx(expected.kl, rel=1e-5, abs=1e-7)
        assert row.lm_loss == pytest.approx(expected.lm_loss, rel=1e-6)
        assert row.cosine == pytest.approx(expected.cosine, rel=1e-5, abs=1e-7)
    assert not list(tmp_path.rglob("activations"))


def test_a_task_needs_the_whole_parent(scored: Scorer) -> None:
    with pytest.raises(PuzzleError, match=r"score.task: needs the whole parent in memory.* raise execution.memory"):
        scored(function=len, memory=150_000)
