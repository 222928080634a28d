"""The noise floor of scores: the parent beside itself, rounded otherwise."""

from dataclasses import replace

import pytest
import torch
from tests.scores.conftest import Scorer
from tests.search.conftest import ask, cost_row, cost_table, score_table

from puzzle.data import TokenData
from puzzle.parents import Parent
from puzzle.search.exact import best


@torch.no_grad()
def test_noise_is_what_other_roundings_of_the_parent_cost(
    scored: Scorer, pico_parent: Parent, pico_data: TokenData, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a plain computation of the whole parent, with the last bit of some values changed after layer 0."""
    model = pico_parent.load(dtype=torch.bfloat16)
    hidden_BTD = model.embed(pico_data.sequences("scoring", slice(0, 16))[:, :-1])
    context = model.model.context(hidden_BTD)
    first_BTD = model.model.layers[0](hidden_BTD, **context)
    other_BTD = first_BTD.clone()
    other_BTD.view(torch.int16)[..., ::16] ^= 1
    log_probabilities = []
    for states_BTD in (first_BTD, other_BTD):
        for layer in model.model.layers[1:]:
            states_BTD = layer(states_BTD, **context)
        logits_BTV = model.final_norm(states_BTD).double() @ model.lm_head.weight.double().T
        log_probabilities.append(logits_BTV.log_softmax(-1))
    own_BTV, its_BTV = log_probabilities
    kl = float((own_BTV.exp() * (own_BTV - its_BTV)).sum(-1).mean())
    for name, memory in ("resident", None), ("streamed", 40_000):
        noise = scored(name, precision="bfloat16", memory=memory).noise
        assert noise == pytest.approx(kl, rel=0.05)
        assert f"known to {noise:.1e} nats" in capsys.readouterr().out
    assert scored("full").noise == 0.0


def test_blocks_below_the_noise_count_as_equal_and_the_parents_as_best() -> None:
    """Without noise two slight cuts look better than one that is a little less slight; with it, one cut is."""
    blocks = ("kv8+w64", 0.0), ("kv4+w64", 1e-6), ("kv2+w64", 9e-6), ("kv1+w64", 0.5)
    scores = score_table([blocks] * 2)
    rows = [cost_row(-1, "fixed", "", 1, decode=1.0)]
    for layer in range(2):
        rows += [cost_row(layer, "attention", f"kv{2**i}", 1, params=2**i, decode=1.0) for i in range(4)]
        rows.append(cost_row(layer, "ffn", "w64", 1))

    def found(noise: float, params: float) -> list[str]:
        solution = best(ask(replace(scores, noise=noise), cost_table(rows, [1])), [{"params": params}])
        assert solution is not None
        return sorted(solution.blocks)

    assert found(0.0, 10) == ["kv4+w64", "kv4+w64"]
    assert found(1e-5, 10) == ["kv2+w64", "kv8+w64"]
    assert found(1e-5, 16) == ["kv8+w64", "kv8+w64"]
    floored = replace(scores, noise=1e-5)
    assert [floored.value(0, name) for name, _ in blocks] == [0.0, 1e-5, 1e-5, 0.5]
    worse = replace(scores, rows=tuple(replace(row, kl=row.kl - 1.0) for row in scores.rows))
    assert worse.value(0, "kv4+w64") == 1e-6 - 1.0  # tables of others may hold any score
