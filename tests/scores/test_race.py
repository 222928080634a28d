"""The race: who stops, what is kept of those that do, and that a run that was cut off goes on."""

from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle
from tests.scores.conftest import Scorer
from torch import Tensor

from puzzle.runs import read_tensors
from puzzle.scores import replace_one
from puzzle.scores.race import rounds, survivors
from puzzle.scores.suffix import METRICS, SuffixScorer
from puzzle.variants import BlockVariant

CONFIG = pico_puzzle("kv4+w48").config


def _names(kl: dict[str, list[float]]) -> list[str]:
    values = {BlockVariant.parse(name): torch.tensor(each, dtype=torch.float64) for name, each in kl.items()}
    return [block.name for block in survivors(values, CONFIG)]


@pytest.mark.parametrize(
    ("share", "sequences", "expected"),
    [
        (None, 64, (64,)),
        (0.0625, 64, (4, 60)),
        (0.0625, 256, (16, 240)),
        (0.0625, 100, (7, 93)),
        (0.25, 8, (4, 4)),
        (0.25, 7, (7,)),
        (0.999, 100, (100,)),
    ],
)
def test_rounds(share: float | None, sequences: int, expected: tuple[int, ...]) -> None:
    assert rounds(share, sequences) == expected


def test_what_is_larger_and_clearly_worse_stops() -> None:
    assert _names({"kv2+w16": [1.0, 1.1, 0.9, 1.0], "kv2+w32": [2.0, 2.2, 1.9, 2.1]}) == ["kv2+w16"]


def test_what_is_larger_and_not_clearly_worse_goes_on() -> None:
    assert len(_names({"kv2+w16": [1.0, 1.1, 0.9, 1.0], "kv2+w32": [1.0, 1.3, 0.9, 1.0]})) == 2


def test_what_is_worse_and_smaller_goes_on() -> None:
    assert len(_names({"kv2+w16": [2.0, 2.2, 1.9, 2.1], "kv2+w32": [1.0, 1.1, 0.9, 1.0]})) == 2


def test_differences_are_taken_sequence_by_sequence() -> None:
    """The means are within one standard error of either, and yet the difference is beyond doubt."""
    kl = [0.1, 4.0, 1.0, 2.0]
    assert _names({"kv2+w16": kl, "kv2+w32": [each + 0.1 for each in kl]}) == ["kv2+w16"]


def test_fewer_parameters_with_more_kv_cache_stop_nobody() -> None:
    """Attention as one large linear map has no KV cache, and more parameters than one KV head here."""
    assert len(_names({"kv1+w16": [1.0] * 4, "linear+w32": [2.0] * 4})) == 2
    assert _names({"kv1+w16": [1.0] * 4, "kv2+w16": [2.0] * 4}) == ["kv1+w16"]


def test_a_window_stops_nobody_of_fewer_heads() -> None:
    """A short window holds less of a long text, and more of a short one."""
    assert len(_names({"kv2win9+w16": [1.0] * 4, "kv1+w32": [2.0] * 4})) == 2
    assert _names({"kv1win9+w16": [1.0] * 4, "kv1+w32": [2.0] * 4}) == ["kv1win9+w16"]


def test_equals_in_size_do_not_stop_each_other() -> None:
    assert len(_names({"kv1win9+w16": [1.0] * 4, "kv1win6s3+w16": [2.0] * 4})) == 2


def test_what_is_not_finite_stops_and_stops_nobody() -> None:
    assert _names({"kv2+w16": [float("nan")] * 4, "kv2+w32": [2.0] * 4}) == ["kv2+w32"]


def _worse_when_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kv1+w64` be far worse than `none+none`."""
    measured = SuffixScorer.blocks

    def blocks(self: SuffixScorer, layer_blocks, wanted, batches):  # type: ignore[no-untyped-def]
        found = measured(self, layer_blocks, wanted, batches)
        return {block: values + 100.0 * (block.name == "kv1+w64") for block, values in found.items()}

    monkeypatch.setattr(SuffixScorer, "blocks", blocks)


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Layer and first batch of every round from now on."""
    calls = []
    measured = SuffixScorer.blocks

    def blocks(self: SuffixScorer, layer_blocks, wanted, batches):  # type: ignore[no-untyped-def]
        calls.append((layer_blocks.layer, batches.start))
        return measured(self, layer_blocks, wanted, batches)

    monkeypatch.setattr(SuffixScorer, "blocks", blocks)
    return calls


def test_losers_are_scored_on_the_first_round_alone(
    scored: Scorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    full = scored("full", race=None)
    _worse_when_larger(monkeypatch)
    raced = scored("raced", race=0.25, composed="raced")
    assert {row.sequences for row in full.rows} == {16}
    losers = [row for row in raced.rows if row.sequences == 4]
    assert [row.block for row in losers if row.block == "kv1+w64"] == ["kv1+w64"] * 3
    assert raced.sequences == 16
    for row in raced.rows:
        if row.sequences == 16:
            assert row.kl == pytest.approx(full.row(row.layer, row.block).kl, rel=1e-4, abs=1e-7)
    (file,) = (tmp_path / "raced").rglob("layer000.safetensors")
    kept: dict[str, Tensor] = read_tensors(file)
    assert len(kept["kv1+w64.kl"]) == 4
    assert len(kept["kv1+none.kl"]) == raced.row(0, "kv1+none").sequences
    saved = len(losers) * 12 / (15 * 16)
    assert (
        f"{len(losers)} of 15 blocks stopped after the first round, which saved {saved:.0%}" in capsys.readouterr().out
    )


def test_a_loss_of_part_of_the_text_is_compared_with_the_parents_of_that_part() -> None:
    """Else what the first sequences are like would count as the block's doing."""
    parent = torch.rand(16, len(METRICS), dtype=torch.float64)
    values = parent[:4] + 0.25
    row = replace_one._row(2, BlockVariant.parse("kv1+w64"), values, parent, None, None)
    assert row.sequences == 4
    assert row.lm_loss == pytest.approx(float(parent[:, METRICS.index("lm_loss")].mean()) + 0.25)
    assert row.kl == pytest.approx(float(values[:, METRICS.index("kl")].mean()))


def test_a_run_that_was_cut_off_between_the_rounds_goes_on_there(
    scored: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = scored("whole", race=0.25, composed="raced")

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(replace_one, "survivors", killed)
        with pytest.raises(Killed):
            scored("cut", race=0.25, composed="raced")
    (folder,) = (tmp_path / "cut" / "stages").glob("score-*")
    assert [file.name for file in folder.glob("*round1*")] == ["layer000.round1.safetensors"]
    calls = _calls(monkeypatch)
    assert scored("cut", race=0.25, composed="raced") == whole
    assert calls[0][0] == 0
    assert calls[0][1] > 0
    assert (1, 0) in calls
