"""Whole architectures beside the parent: true scores, where the search only has sums.

The text is the end of the scoring range: where that is long enough, none of it is what the blocks' own scores were
measured on. Test text is left for the final comparison.

Shapes: B sequences a batch, T tokens, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from puzzle.artefacts import WholeScore
from puzzle.data import TokenData
from puzzle.device import memory_bytes, tokens_at_once
from puzzle.errors import PuzzleError
from puzzle.library import Library, Names, final_states
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress, read_json, write_json
from puzzle.scores.replace_one import METRICS, per_sequence, variance_of_kl


@torch.no_grad()
def true_scores(
    run: Run, parent: Parent, data: TokenData, library: Library, architectures: Sequence[Names]
) -> list[WholeScore]:
    """Scores of whole architectures made of the library's blocks, without assembling them (`final_states`).

    No more than the blocks of one layer are in memory. What is known is kept in `whole/ADDRESS.json` of the run folder.
    One that is not finite has infinite divergence.
    """
    available, count = (data.num_sequences("scoring", tokens) for tokens in (None, run.recipe.correct.tokens))
    if not count:
        raise PuzzleError("correct.tokens: found 0; whole architectures are compared on some text")
    identity = [count, run.recipe.precision, parent.address, library.address, data.address]
    file = run.path / "whole" / f"{digest(identity)[:24]}.json"
    file.parent.mkdir(exist_ok=True)
    rows = [row | {"blocks": tuple(row["blocks"])} for row in (read_json(file) if file.exists() else ())]
    known = {row["blocks"]: WholeScore(**row) for row in rows}
    if not (missing := sorted(set(architectures) - known.keys())):
        return [known[blocks] for blocks in architectures]
    model = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device, layers=())
    sequences = data.sequences("scoring", slice(available - count, available)).to(run.device)
    batches = sequences.split(max(1, tokens_at_once(run.device, model.config.hidden_size) // data.sequence_length))
    # Half of the memory holds their states, entering a layer and leaving it.
    state_bytes = 2 * sequences[:, 1:].numel() * model.config.hidden_size * model.dtype.itemsize
    half_bytes = memory_bytes(run.device, run.recipe.execution.memory) // 2
    at_once = min(64, max(1, half_bytes // state_bytes))  # after so many, what is known is written
    with progress("whole architectures", len(missing)) as bar:
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            known |= {score.blocks: score for score in _measured(library, model, batches, some)}
            write_json(file, [asdict(score) for score in known.values()])
            bar.advance(len(some))
    return [known[blocks] for blocks in architectures]


def _measured(
    library: Library, model: PuzzleForCausalLM, batches: Sequence[Tensor], architectures: Sequence[Names]
) -> Iterator[WholeScore]:
    """Beside the parent, whose final states are computed with theirs."""
    every = [library.parent.architecture.names, *architectures]
    states = final_states(library, model, every, [tokens_BT[:, :-1] for tokens_BT in batches])
    metrics = [
        per_sequence(model, own_BTD, torch.stack(others), tokens_BT)
        for tokens_BT, (own_BTD, *others) in zip(batches, zip(*states, strict=True), strict=True)
    ]
    for blocks, values in zip(architectures, torch.cat(metrics, dim=1).cpu(), strict=True):
        finite = bool(values.isfinite().all())
        means = values.mean(0).tolist() if finite else (math.inf, math.inf, 0.0, math.inf)
        kl_se = math.sqrt(variance_of_kl(values)) if finite else 0.0
        yield WholeScore(blocks=blocks, kl_se=kl_se, **dict(zip(METRICS, means, strict=True)))
