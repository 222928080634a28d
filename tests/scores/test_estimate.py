"""Composed blocks from the first share of the text, and from their subblocks' scores on all of it."""

from pathlib import Path

import pytest
from tests.scores.conftest import Scorer

from puzzle.runs import read_tensors

COMPOSED = ("kv1+none", "none+none")
SUBBLOCKS = ("kv4+none", "kv1+w64", "none+w64")


def test_the_estimate_is_the_subblocks_sum_and_what_the_block_has_beyond_it(scored: Scorer, tmp_path: Path) -> None:
    table = scored("estimated", composed_share=0.25)
    (file,) = (tmp_path / "estimated").rglob("layer001.safetensors")
    kl = {name.removesuffix(".kl"): values for name, values in read_tensors(file).items() if name.endswith(".kl")}
    agreement = {name: values for name, values in read_tensors(file).items() if name.endswith("agreement")}
    for block in COMPOSED:
        attention, ffn = block.split("+")
        summed = kl[f"{attention}+w64"] + kl[f"kv4+{ffn}"]
        assert len(kl[block]) == table.row(1, block).sequences == 4
        beyond = kl[block] - summed[:4]
        assert table.row(1, block).kl == pytest.approx(float(summed.mean() + beyond.mean()))
        variance = summed.var() / 16 + beyond.var() / 4
        assert table.row(1, block).kl_se == pytest.approx(float(variance**0.5))
        lost = 2 - agreement[f"{attention}+w64.top1_agreement"] - agreement[f"kv4+{ffn}.top1_agreement"]
        own = 1 - agreement[f"{block}.top1_agreement"]
        expected = 1 - float(lost.mean() + (own - lost[:4]).mean())
        assert table.row(1, block).top1_agreement == pytest.approx(expected)
    for block in SUBBLOCKS:
        assert len(kl[block]) == table.row(1, block).sequences == 16


def test_the_estimate_is_nearer_than_the_first_share_alone(scored: Scorer, tmp_path: Path) -> None:
    full, estimated = scored("full", composed_share=None), scored("estimated", composed_share=0.25)
    errors, alone = [], []
    for layer in range(3):
        (file,) = (tmp_path / "estimated").rglob(f"layer{layer:03d}.safetensors")
        for block in COMPOSED:
            true = full.row(layer, block)
            first = float(read_tensors(file)[f"{block}.kl"].mean())
            errors.append(abs(estimated.row(layer, block).kl - true.kl) / true.kl)
            alone.append(abs(first - true.kl) / true.kl)
            assert estimated.row(layer, block).lm_loss == pytest.approx(true.lm_loss, rel=0.02)
        for block in SUBBLOCKS:
            assert estimated.row(layer, block).kl == pytest.approx(full.row(layer, block).kl)
    assert sum(errors) < 0.9 * sum(alone)


def test_too_little_text_is_scored_as_a_whole(scored: Scorer) -> None:
    """A share of fewer than four sequences says nothing of its own spread."""
    assert {row.sequences for row in scored(tokens=7 * 32, composed_share=0.25).rows} == {7}
    assert {row.sequences for row in scored("longer", tokens=8 * 32, composed_share=0.25).rows} == {4, 8}
