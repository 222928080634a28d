"""Law 4: BLD never ends worse than it started, and in one layer wider is not worse."""

from collections import defaultdict

import pytest

from puzzle.library import Library


def test_training_never_ends_worse_than_it_started_and_nearly_always_helps(pico_library: Library) -> None:
    rows = pico_library.index.rows
    assert all(row.loss <= row.initial_loss for row in rows)
    trained = [row for row in rows if row.trained_tokens]
    assert len(trained) == 4 * (2 + 6)
    assert sum(row.loss < row.initial_loss for row in trained) > 0.9 * len(trained)


def test_wider_is_not_worse(pico_library: Library) -> None:
    sized = defaultdict(list)
    for row in pico_library.index.rows:
        if (size := row.variant.lstrip("kvw")).isdigit():
            sized[row.layer, row.subblock].append((int(size), row.loss))
    assert sorted(map(len, sized.values())) == 4 * [2] + 4 * [6]
    for rows in sized.values():
        losses = [loss for _, loss in sorted(rows)]
        assert losses == sorted(losses, reverse=True)


def test_none_has_a_loss_of_exactly_one(pico_library: Library) -> None:
    nones = [row for row in pico_library.index.rows if row.variant == "none"]
    assert [row.loss for row in nones] == pytest.approx([1.0] * 8)
    assert not any(row.file for row in nones)
