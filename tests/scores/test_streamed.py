"""A parent that does not fit in memory has the scores of one that does."""

from typing import Any

import pytest
from tests.scores.conftest import Scorer

from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.streams import Stream


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("memory", ["40kB", "150kB"])
def test_streamed_scores_are_resident_scores(memory: str, share: float | None, scored: Scorer) -> None:
    resident = scored("resident", composed_share=share)
    streamed = scored("streamed", composed_share=share, execution={"memory": memory})
    assert len(streamed.rows) == len(resident.rows)
    for row, expected in zip(streamed.rows, resident.rows, strict=True):
        assert (row.layer, row.block, row.sequences) == (expected.layer, expected.block, expected.sequences)
        assert row.kl == pytest.approx(expected.kl, rel=1e-5, abs=1e-7)
        assert row.lm_loss == pytest.approx(expected.lm_loss, rel=1e-6)
        assert row.cosine == pytest.approx(expected.cosine, rel=1e-5, abs=1e-7)


def test_what_is_kept_on_disk_meanwhile_is_deleted(scored: Scorer, tmp_path: Any) -> None:
    scored("streamed", execution={"memory": "40kB"})
    assert not list((tmp_path / "streamed").rglob("activations"))


def test_a_task_needs_the_whole_parent(scored: Scorer) -> None:
    with pytest.raises(PuzzleError, match=r"score.task: needs the whole parent in memory.* raise execution.memory"):
        scored(function=len, execution={"memory": "40kB"})


def test_small_memory_is_streamed(scored: Scorer, open_folder: Any, pico_parent: Parent, tmp_path: Any) -> None:
    """What the tests above rely on."""
    run = open_folder("run", execution={"memory": "150kB"})
    assert not Stream(run, pico_parent, tmp_path / "folder").resident
