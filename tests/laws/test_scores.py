"""Law 9: a score by suffix recomputation equals the score by a full forward."""

import pytest
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from puzzle.artefacts import ScoreTable
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores.task import with_block
from puzzle.variants import Space


@pytest.mark.parametrize("layer", range(4))
def test_score_equals_a_full_forward_of_the_replaced_model(
    layer: int,
    pico_run: Run,
    pico_parent: Parent,
    pico_library: Library,
    pico_space: Space,
    pico_data: TokenData,
    pico_scores: ScoreTable,
) -> None:
    parent = pico_parent.load()
    (sequences,) = pico_data.batches("scoring", 1000, pico_run.recipe.score.tokens)
    tokens_BT, targets_BT = sequences[:, :-1], sequences[:, 1:]
    parent_logp = log_softmax(parent(tokens_BT).logits.double(), -1)
    parent_hidden = parent.model(tokens_BT).last_hidden_state.double()
    for block in pico_space.layers[layer].blocks()[1::5]:
        row = pico_scores.by_key[layer, block.name]
        model = with_block(parent, layer, block, pico_library)
        hidden = model.model(tokens_BT).last_hidden_state
        logp = log_softmax(model.lm_head(hidden).double(), -1)
        kl_B = kl_div(logp, parent_logp, log_target=True, reduction="none").sum(-1).mean(-1)
        assert row.sequences == len(kl_B)
        assert row.kl == pytest.approx(float(kl_B.mean()), rel=1e-3, abs=1e-6)
        assert row.kl_se == pytest.approx(float(kl_B.std() / len(kl_B) ** 0.5), rel=1e-3, abs=1e-6)
        loss = -logp.gather(-1, targets_BT.unsqueeze(-1)).mean()
        assert row.lm_loss == pytest.approx(float(loss), rel=1e-4)
        agreement = (logp.argmax(-1) == parent_logp.argmax(-1)).double().mean()
        assert row.top1_agreement == pytest.approx(float(agreement), abs=2e-3)
        cosine = 1 - cosine_similarity(hidden.double(), parent_hidden, dim=-1).mean()
        assert row.cosine == pytest.approx(float(cosine), rel=1e-4, abs=1e-7)


def test_every_block_has_a_score_and_the_parents_own_score_zero(
    pico_scores: ScoreTable, pico_space: Space, pico_parent: Parent
) -> None:
    expected = [(i, block.name) for i, layer in enumerate(pico_space.layers) for block in layer.blocks()]
    assert [(row.layer, row.block) for row in pico_scores.rows] == expected
    names = pico_parent.architecture.names
    assert pico_scores.total(names) == 0.0
    assert all(pico_scores.by_key[i, name].top1_agreement == 1.0 for i, name in enumerate(names))


def test_removing_more_is_worse(pico_scores: ScoreTable) -> None:
    for layer in range(pico_scores.num_layers):
        ffn = [pico_scores.by_key[layer, f"kv4+{name}"].kl for name in ("w56", "w16", "none")]
        assert ffn == sorted(ffn)
