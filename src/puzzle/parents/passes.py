"""The parent run over texts a few layers at a time: neither its weights nor its activations need to fit in memory.

A parent that fits is loaded once. Of a larger one, only the layers in use hold weights, and what enters the first of
them is kept on disk for every batch of every text. What is counted is weights and what the caller says that it keeps;
what one batch takes on its way through a layer, and its logits, come on top.

Shapes: B batch, T tokens, D hidden size.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.parents.parent import Parent
from puzzle.runs import Run, read_json, read_tensors, write_json, write_tensors
from puzzle.units import format_bytes
from puzzle.variants import Subblock, contribution, num_params

Texts = Mapping[str, Callable[[], Iterable[Tensor]]]
"""Named texts: each gives its batches of tokens, [B, T], in order, as often as it is asked."""


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """One layer seen in a pass. A subblock's contribution is what it adds to the residual stream, zeros if absent."""

    index: int
    layer: PuzzleDecoderLayer
    context: dict[str, Any]
    """What the layer is called with beside the hidden states."""
    entered_BTD: Tensor
    attention_BTD: Tensor
    """The attention subblock's contribution."""
    middle_BTD: Tensor
    """What enters the FFN subblock."""
    ffn_BTD: Tensor
    """The FFN subblock's contribution."""
    left_BTD: Tensor
    """The layer's output."""

    def entering(self, subblock: Subblock) -> Tensor:
        return self.entered_BTD if subblock == "attention" else self.middle_BTD

    def contribution(self, subblock: Subblock) -> Tensor:
        return self.attention_BTD if subblock == "attention" else self.ffn_BTD


class ParentPasses:
    """The parent for inference, any range of layers over any text.

    Args:
        folder: where the inputs of layers are kept while they are needed; `close` deletes it.
        reserved_bytes: memory that the caller needs beside the parent all the time.
    """

    def __init__(self, run: Run, parent: Parent, folder: Path, reserved_bytes: int = 0) -> None:
        self._run, self._parent, self._folder = run, parent, folder
        # Asked once: what is free is less as soon as the weights are loaded.
        memory_bytes = run.memory_bytes
        dtype = getattr(torch, run.recipe.precision)
        config = parent.config
        blocks = parent.architecture.blocks
        params = [num_params(block.attention, config) + num_params(block.ffn, config) for block in blocks]
        self.layer_bytes = [dtype.itemsize * count for count in params]
        self.outer_bytes = dtype.itemsize * (parent.num_params - sum(params))
        """Of what belongs to no layer, which is always held."""
        self._budget = memory_bytes - reserved_bytes - self.outer_bytes
        self.resident = sum(self.layer_bytes) <= self._budget
        self.model = parent.load(dtype=dtype, device=run.device, layers=None if self.resident else ())

    def hold(self, layers: Collection[int]) -> None:
        """Have the weights of these layers; of a streamed parent, of no others."""
        if not self.resident:
            self._parent.hold(self.model, layers)

    def groups(self, layers: Iterable[int], extra_bytes: Callable[[int], int]) -> Iterator[range]:
        """Runs of layers, each as long as its weights and `extra_bytes` fit into the memory, but never empty.

        A layer that does not fit at all is a run by itself. Of a streamed parent runs do not reach over layers that
        are not asked for.

        Args:
            extra_bytes: what a layer needs beside its own weights.
        """
        budget = self._budget - (sum(self.layer_bytes) if self.resident else 0)
        group: list[int] = []
        used = 0
        for layer in layers:
            needed = extra_bytes(layer) + (0 if self.resident else self.layer_bytes[layer])
            gap = bool(group) and layer != group[-1] + 1 and not self.resident
            if group and (used + needed > budget or gap):
                yield range(group[0], group[-1] + 1)
                group, used = [], 0
            group.append(layer)
            used += needed
        if group:
            yield range(group[0], group[-1] + 1)

    @torch.no_grad()
    def prepare(self, layer: int, texts: Texts) -> None:
        """Have what enters `layer` on disk for every batch of `texts`; layer 0 takes the embeddings and needs nothing.

        Goes on from the nearest layer below that is on disk, and after a kill from the last batch that was written. Of
        a text, no more than two layers' inputs are on disk at a time.
        """
        starts = {name: self._start(name, layer) for name in texts}
        if all(start == layer for start in starts.values()):
            return
        self._check_disk({name: batches for name, batches in texts.items() if starts[name] < layer})
        for group in self.groups(range(min(starts.values()), layer), lambda _: 0):
            self.hold(group)
            for name, batches in texts.items():
                if (start := max(group.start, starts[name])) < group.stop:
                    self._advance(name, batches, range(start, group.stop))

    @torch.no_grad()
    def entering(self, layer: int, text: str, index: int, tokens_BT: Tensor) -> Tensor:
        """What enters `layer` for batch `index` of a text that was prepared for it, [B, T, D]."""
        if layer == 0:
            return self.model.model.embed_tokens(tokens_BT.to(self.model.device))
        return read_tensors(self._file(text, layer, index))["hidden_BTD"].to(self.model.device)

    def through(self, layers: range, text: str, index: int, tokens_BT: Tensor) -> Iterator[LayerPass]:
        """Each of `layers` in order, for batch `index` of a text that was prepared for the first of them."""
        return self._through(layers, self.entering(layers.start, text, index, tokens_BT))

    def close(self) -> None:
        """Delete what was kept on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _through(self, layers: range, hidden_BTD: Tensor) -> Iterator[LayerPass]:
        """Gradients are off for the parent alone: what the caller does with a layer may train."""
        with torch.no_grad():
            context = self.model.model.context(hidden_BTD)
        for index in layers:
            layer = cast(PuzzleDecoderLayer, self.model.model.layers[index])
            with torch.no_grad():
                attention_BTD = contribution(layer, "attention", hidden_BTD, context)
                middle_BTD = hidden_BTD + attention_BTD
                ffn_BTD = contribution(layer, "ffn", middle_BTD, context)
                left_BTD = middle_BTD + ffn_BTD
            yield LayerPass(
                index=index,
                layer=layer,
                context=context,
                entered_BTD=hidden_BTD,
                attention_BTD=attention_BTD,
                middle_BTD=middle_BTD,
                ffn_BTD=ffn_BTD,
                left_BTD=left_BTD,
            )
            hidden_BTD = left_BTD

    def _advance(self, text: str, batches: Callable[[], Iterable[Tensor]], layers: range) -> None:
        """Replace what enters the first of `layers` by what leaves the last; files that are there are as they were."""
        self._keep_only(text, layers.start, layers.stop)
        self._file(text, layers.stop, 0).parent.mkdir(parents=True, exist_ok=True)
        for index, tokens_BT in enumerate(batches()):
            file = self._file(text, layers.stop, index)
            if not file.exists():
                for seen in self.through(layers, text, index, tokens_BT):
                    if seen.index == layers[-1]:
                        write_tensors(file, {"hidden_BTD": seen.left_BTD})
        write_json(self._ready_file(text), {"layer": layers.stop})
        self._keep_only(text, layers.stop)

    def _start(self, text: str, layer: int) -> int:
        """The layer up to `layer` whose inputs are complete; what is of a later one is of no use."""
        file = self._ready_file(text)
        ready = int(read_json(file)["layer"]) if file.exists() else 0
        if ready <= layer:
            return ready
        file.unlink()
        self._keep_only(text)
        return 0

    def _keep_only(self, text: str, *layers: int) -> None:
        for folder in (self._folder / text).glob("[0-9]*"):
            if int(folder.name) not in layers:
                shutil.rmtree(folder)

    def _ready_file(self, text: str) -> Path:
        return self._folder / text / "ready.json"

    def _file(self, text: str, layer: int, index: int) -> Path:
        return self._folder / text / f"{layer:03d}" / f"{index:06d}.safetensors"

    def _check_disk(self, texts: Texts) -> None:
        """The inputs of one layer for every text, and of a second for one text at a time, beside what there is."""
        tokens = {name: sum(tokens_BT.numel() for tokens_BT in batches()) for name, batches in texts.items()}
        token_bytes = self._parent.config.hidden_size * self.model.dtype.itemsize
        others = sum(_size(folder) for folder in self._folder.glob("*") if folder.name not in texts)
        needed = (sum(tokens.values()) + max(tokens.values())) * token_bytes + others
        allowed = self._run.disk_bytes
        if self._run.recipe.execution.disk is None:  # what is free does not hold what is here already
            allowed += _size(self._folder)
        if needed > allowed:
            raise PuzzleError(
                f"execution.disk: the activations of {sum(tokens.values()):,} tokens ({', '.join(texts)}) take "
                f"{format_bytes(needed)}, allowed are {format_bytes(allowed)}; raise execution.disk or "
                "execution.memory, or take fewer tokens"
            )


def _size(folder: Path) -> int:
    """Bytes of the inputs in it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
