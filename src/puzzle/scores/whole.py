"""Whole architectures beside the parent: true scores, where the search only has sums.

The text is the end of the scoring range: where that is long enough, none of it is what the blocks' own scores were
measured on. Test text is left for the final comparison.

Shapes: B sequences a batch, T tokens, D hidden size, N = B * T.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from puzzle.artefacts import WholeScore
from puzzle.data import TokenData
from puzzle.device import tokens_at_once
from puzzle.errors import PuzzleError
from puzzle.library import Library, final_states
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress, read_json, write_json
from puzzle.scores.suffix import METRICS, per_sequence

Blocks = tuple[str, ...]
"""One block name a layer."""

_AT_ONCE = 64
"""Architectures between two writes of what is known."""


class TrueScore:
    """Scores whole architectures made of the library's blocks; calling it gives what the recipe's search wants low.

    Nothing is assembled: the text goes through one layer at a time, with the blocks in it that the architectures ask
    for, and architectures that begin alike share what enters the layers up to where they part. So no more than the
    blocks of one layer are in memory, and a block replaced near the end costs but the layers after it. What is known
    is kept in `whole/ADDRESS.json` of the run folder.
    """

    def __init__(self, run: Run, parent: Parent, data: TokenData, library: Library) -> None:
        self._run, self._parent, self.library = run, parent, library
        self.score = run.recipe.search.score
        available = data.num_sequences("scoring")
        count = min(math.ceil(run.recipe.correct.tokens / data.sequence_length), available)
        self.tokens = count * data.sequence_length
        self._sequences = data.sequences("scoring", slice(available - count, available))
        self._batch_size = max(1, tokens_at_once(run.device) // data.sequence_length)
        identity = [count, run.recipe.precision, parent.address, library.address, data.address]
        self._file = run.path / "whole" / f"{digest(identity)[:24]}.json"
        self._known = _read(self._file)

    def __call__(self, architectures: Sequence[Blocks]) -> list[float]:
        return [score.value(self.score) for score in self.scores(architectures)]

    @torch.no_grad()
    def scores(self, architectures: Sequence[Blocks]) -> list[WholeScore]:
        """In their order; those not known yet are computed. One that is not finite has infinite divergence."""
        if self.tokens == 0:
            raise PuzzleError("correct.tokens: found 0; whole architectures are compared on some text")
        missing = sorted({blocks for blocks in architectures if blocks not in self._known})
        with progress("whole architectures", len(missing)) as bar:
            for start in range(0, len(missing), self._at_once):
                some = missing[start : start + self._at_once]
                self._known |= dict(zip(some, self._measured(some), strict=True))
                _write(self._file, self._known)
                bar.advance(len(some))
        return [self._known[blocks] for blocks in architectures]

    @property
    def _at_once(self) -> int:
        """As many as half of the memory holds the states of, entering a layer and leaving it."""
        state_bytes = 2 * self.tokens * self._model.config.hidden_size * self._model.dtype.itemsize
        return min(_AT_ONCE, max(1, self._run.memory_bytes // 2 // state_bytes))

    @cached_property
    def _model(self) -> PuzzleForCausalLM:
        """Embeddings, final norm and head; layers hold no weights."""
        dtype = getattr(torch, self._run.recipe.precision)
        return self._parent.load(dtype=dtype, device=self._run.device, layers=())

    @cached_property
    def _parent_states(self) -> list[Tensor]:
        """What leaves the parent's last layer, a batch each, [B, T, D]."""
        with torch.no_grad():
            (states,) = self._finals([tuple(block.name for block in self._parent.architecture.blocks)])
        return states

    def _measured(self, architectures: Sequence[Blocks]) -> list[WholeScore]:
        parts: list[Tensor] = []
        finals = zip(*self._finals(architectures), strict=True)
        for tokens_BT, parent_BTD, finals_BTD in zip(self._batches(), self._parent_states, finals, strict=True):
            targets_N, finals_AND = tokens_BT[:, 1:].flatten(), torch.stack(finals_BTD).flatten(1, 2)
            metrics = compare(self._model, self._model, parent_BTD.flatten(0, 1), finals_AND, targets_N)
            parts.append(per_sequence(metrics, len(tokens_BT)))
        return [_score(values) for values in torch.cat(parts, dim=1)]

    def _finals(self, architectures: Sequence[Blocks]) -> list[list[Tensor]]:
        inputs = (tokens_BT[:, :-1] for tokens_BT in self._batches())
        return final_states(self.library, self._model, architectures, inputs)

    def _batches(self) -> Iterable[Tensor]:
        """Inputs and the last target, [B, T + 1]."""
        return (tokens_BT.to(self._model.device) for tokens_BT in self._sequences.split(self._batch_size))


def _score(values: Tensor) -> WholeScore:
    """From the metrics of each sequence."""
    if not values.isfinite().all():
        return WholeScore(kl=math.inf, kl_se=0.0, lm_loss=math.inf, top1_agreement=0.0, cosine=math.inf)
    means = dict(zip(METRICS, values.mean(0).tolist(), strict=True))
    error = math.sqrt(float(values[:, METRICS.index("kl")].var()) / len(values)) if len(values) > 1 else 0.0
    return WholeScore(kl_se=error, **means)


def _read(file: Path) -> dict[Blocks, WholeScore]:
    return {tuple(row.pop("blocks")): WholeScore(**row) for row in read_json(file)} if file.exists() else {}


def _write(file: Path, known: dict[Blocks, WholeScore]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_json(file, [{"blocks": blocks} | asdict(score) for blocks, score in known.items()])
