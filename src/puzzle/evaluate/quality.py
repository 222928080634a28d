"""Quality of a model beside its parent, on test text (docs/numbers.md)."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.metrics import compare
from puzzle.parents import Parent
from puzzle.runs import Run, progress
from puzzle.stages import EVALUATE
from puzzle.streams import Stream

_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over the tokens of the test text."""

    test_loss: float
    """Negative log-likelihood of the next token, nats per token."""
    top1: float
    """Share of next tokens that are the model's likeliest."""
    kl: float
    """KL(parent || model), nats per token."""
    top1_agreement: float
    """Share of tokens where the likeliest token is the parent's."""


def evaluate(run: Run, parent: Parent, child: Child | None, data: TokenData, label: str) -> Quality:
    """The quality of `child`, or of the parent itself where that is None; neither needs to fit in memory."""
    stage = run.open(EVALUATE, parent=parent, model=child or parent, data=data)
    if not stage.done:
        stage.commit(**asdict(_measure(run, parent, child, data, label, stage.path)))
    names = Quality.__dataclass_fields__
    return Quality(**{name: value for name, value in stage.facts.items() if name in names})


@torch.no_grad()
def _measure(run: Run, parent: Parent, child: Child | None, data: TokenData, label: str, folder: Path) -> Quality:
    """The model's own head on its own hidden states: norms and heads of parent and child differ after GKD."""
    sources = [parent] if child is None else [parent, child.source()]
    other_bytes = getattr(torch, run.recipe.precision).itemsize * parent.num_params * (len(sources) - 1)
    streams = [Stream(run, each, folder / f"activations{place}", other_bytes) for place, each in enumerate(sources)]
    tokens = data.num_sequences("test", run.recipe.evaluate.tokens) * data.sequence_length
    inputs = partial(data.inputs, "test", _BATCH_SIZE, tokens)
    names = ("lm_loss", "top1", "kl", "top1_agreement")
    sums = torch.zeros(len(names), dtype=torch.float64, device=run.device)
    finals = zip(*(stream.finals("test", inputs) for stream in streams), strict=True)
    with progress(f"evaluate the {label}", tokens) as bar:
        for sequences, states_BTD in zip(data.batches("test", _BATCH_SIZE, tokens), finals, strict=True):
            parent_ND, model_ND = states_BTD[0].flatten(0, 1), states_BTD[-1].flatten(0, 1)
            targets_N = sequences[:, 1:].flatten().to(run.device)
            metrics = compare(streams[0].model, streams[-1].model, parent_ND, model_ND.unsqueeze(0), targets_N)
            sums += torch.stack([getattr(metrics, name).double().sum() for name in names])
            bar.advance(len(targets_N))
    for stream in streams:
        stream.close()
    means = dict(zip(names, (sums / tokens).tolist(), strict=True))
    if not all(math.isfinite(mean) for mean in means.values()):
        raise PuzzleError(f"evaluate: the {label} is not finite on test text ({means}); lower distil.learning_rate")
    return Quality(test_loss=means.pop("lm_loss"), **means)
