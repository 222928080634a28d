"""Quality of a model beside its parent, on test text (docs/numbers.md)."""

import math
from dataclasses import asdict, dataclass

import torch

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.metrics import TokenMetrics, compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, progress

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
    """The quality of `child`, or of the parent itself where that is None."""
    settings = {"tokens": run.recipe.evaluate.tokens, "precision": run.recipe.precision}
    address = child.address if child is not None else parent.address
    stage = run.stage("evaluate", version=1, settings=settings, inputs=(parent.address, address, data.address))
    if not stage.done:
        stage.commit(**asdict(_measure(run, parent, child, data, label)))
    names = Quality.__dataclass_fields__
    return Quality(**{name: value for name, value in stage.facts.items() if name in names})


@torch.no_grad()
def _measure(run: Run, parent: Parent, child: Child | None, data: TokenData, label: str) -> Quality:
    dtype = getattr(torch, run.recipe.precision)
    reference = parent.load(dtype=dtype, device=run.device)
    model = reference if child is None else child.load(dtype=dtype, device=run.device)
    tokens = min(run.recipe.evaluate.tokens, data.num_sequences("test") * data.sequence_length)
    sums = dict.fromkeys(("lm_loss", "top1", "kl", "top1_agreement"), 0.0)
    count = 0
    with progress(f"evaluate the {label}", tokens) as bar:
        for sequences in data.batches("test", _BATCH_SIZE, tokens):
            tokens_BT = sequences.to(run.device)
            metrics = _compare(reference, model, tokens_BT)
            for name in sums:
                sums[name] += float(getattr(metrics, name).double().sum())
            count += len(metrics.kl)
            bar.advance(len(metrics.kl))
    means = {name: total / count for name, total in sums.items()}
    if not all(math.isfinite(mean) for mean in means.values()):
        raise PuzzleError(f"evaluate: the {label} is not finite on test text ({means}); lower distil.learning_rate")
    return Quality(test_loss=means.pop("lm_loss"), **means)


def _compare(reference: PuzzleForCausalLM, model: PuzzleForCausalLM, tokens_BT: torch.Tensor) -> TokenMetrics:
    """The model's own head on its own hidden states; norms and heads of parent and child differ after GKD."""
    inputs_BT, targets_N = tokens_BT[:, :-1], tokens_BT[:, 1:].flatten()
    hidden_ND, parent_hidden_ND = _last_hidden(model, inputs_BT), _last_hidden(reference, inputs_BT)
    return compare(reference, model, parent_hidden_ND, [hidden_ND], targets_N)[0]


def _last_hidden(model: PuzzleForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD = model.model.embed_tokens(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, **context)
    return hidden_BTD.flatten(0, 1)
