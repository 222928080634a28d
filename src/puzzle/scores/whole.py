"""Whole architectures beside the parent: true scores, where the search only has sums.

The text is the end of the scoring range: where that is long enough, none of it is what the blocks' own scores were
measured on. Test text is left for the final comparison.

Shapes: B sequences a batch, T tokens, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property

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

_AT_ONCE = 64
"""Architectures between two writes of what is known."""


class TrueScore:
    """Scores whole architectures made of the library's blocks, without assembling them (`final_states`).

    No more than the blocks of one layer are in memory, and a block replaced near the end costs but the layers after it.
    What is known is kept in `whole/ADDRESS.json` of the run folder.
    """

    def __init__(self, run: Run, parent: Parent, data: TokenData, library: Library) -> None:
        self._run, self._parent, self._library = run, parent, library
        available = data.num_sequences("scoring")
        count = data.num_sequences("scoring", run.recipe.correct.tokens)
        self._sequences = data.sequences("scoring", slice(available - count, available)).to(run.device)
        self._batches = self._sequences.split(max(1, tokens_at_once(run.device) // data.sequence_length))
        identity = [count, run.recipe.precision, parent.address, library.address, data.address]
        self._file = run.path / "whole" / f"{digest(identity)[:24]}.json"
        rows = read_json(self._file) if self._file.exists() else []
        known = (WholeScore(**row | {"blocks": tuple(row["blocks"])}) for row in rows)
        self._known: dict[Names, WholeScore] = {score.blocks: score for score in known}

    @torch.no_grad()
    def scores(self, architectures: Sequence[Names]) -> list[WholeScore]:
        """In their order; those not known yet are computed. One that is not finite has infinite divergence."""
        if not len(self._sequences):
            raise PuzzleError("correct.tokens: found 0; whole architectures are compared on some text")
        missing = sorted({blocks for blocks in architectures if blocks not in self._known})
        # Half of the memory holds their states, entering a layer and leaving it.
        tokens = self._sequences[:, 1:].numel()
        state_bytes = 2 * tokens * self._model.config.hidden_size * self._model.dtype.itemsize
        half_bytes = memory_bytes(self._run.device, self._run.recipe.execution.memory) // 2
        at_once = min(_AT_ONCE, max(1, half_bytes // state_bytes))
        with progress("whole architectures", len(missing)) as bar:
            for start in range(0, len(missing), at_once):
                some = missing[start : start + at_once]
                self._known |= {score.blocks: score for score in self._measured(some)}
                self._file.parent.mkdir(exist_ok=True)
                write_json(self._file, [asdict(score) for score in self._known.values()])
                bar.advance(len(some))
        return [self._known[blocks] for blocks in architectures]

    @cached_property
    def _model(self) -> PuzzleForCausalLM:
        """The parent's embeddings, final norm and head; layers hold no weights."""
        dtype = getattr(torch, self._run.recipe.precision)
        return self._parent.load(dtype=dtype, device=self._run.device, layers=())

    @cached_property
    def _parent_states(self) -> list[Tensor]:
        """What leaves the parent's last layer, a batch each, [B, T, D]."""
        return self._finals([self._parent.architecture.names])[0]

    def _finals(self, architectures: Sequence[Names]) -> list[list[Tensor]]:
        return final_states(self._library, self._model, architectures, [each[:, :-1] for each in self._batches])

    def _measured(self, architectures: Sequence[Names]) -> Iterator[WholeScore]:
        finals = zip(*self._finals(architectures), strict=True)
        batches = zip(self._batches, self._parent_states, finals, strict=True)
        metrics = [per_sequence(self._model, own, torch.stack(states), tokens) for tokens, own, states in batches]
        for blocks, values in zip(architectures, torch.cat(metrics, dim=1), strict=True):
            finite = bool(values.isfinite().all())
            means = values.mean(0).tolist() if finite else (math.inf, math.inf, 0.0, math.inf)
            kl_se = math.sqrt(variance_of_kl(values)) if finite else 0.0
            yield WholeScore(blocks=blocks, kl_se=kl_se, **dict(zip(METRICS, means, strict=True)))
