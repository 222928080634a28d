"""The one way to run a model over text layer by layer, whether or not it fits in memory.

A model that fits is loaded once: it is *resident*. Of a larger one, which is *streamed*, only embeddings, final norm,
head and the layers in use hold weights; a thread reads the next ones meanwhile. What enters the layers in use is kept
on disk for every batch of every text. Counted against the memory are weights and what the caller asks for; what one
batch takes on its way through a layer, and its logits, come on top.

Shapes: B batch, T tokens, D hidden size.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor

from puzzle.device import disk_bytes, memory_bytes
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.parents import Parent
from puzzle.runs import Run, read_tensors, write_tensors
from puzzle.units import format_bytes
from puzzle.variants import SUBBLOCKS, State, Subblock

Texts = Mapping[str, Callable[[], Iterable[Tensor]]]
"""Named texts: each gives its batches of tokens, [B, T], in order, as often as it is called."""

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


def packed(items: Iterable[_Item], size: Callable[[_Item], int], room: int) -> Iterator[list[_Item]]:
    """Consecutive items, as many at a time as `room` has space for, but always at least one."""
    group: list[_Item] = []
    used = 0
    for item in items:
        if group and used + size(item) > room:
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def read_ahead(items: Iterable[_Item], read: Callable[[_Item], _Read]) -> Iterator[tuple[_Item, _Read]]:
    """Each item with what `read` gives for it; a thread reads the next while this one is in use."""
    with ThreadPoolExecutor(1) as thread:
        reading = ((item, thread.submit(read, item)) for item in items)
        for pending, _ in pairwise(chain(reading, [None])):
            assert pending is not None
            yield pending[0], pending[1].result()


@dataclass(frozen=True)
class LayerPass:
    """One layer on one batch."""

    index: int
    layer: PuzzleDecoderLayer
    context: dict[str, Any]
    """What the layer is called with beside the hidden states."""
    inputs_BTD: Mapping[Subblock, Tensor]
    """What enters each subblock; the attention's is the layer's."""
    added_BTD: Mapping[Subblock, Tensor]
    """What each subblock adds to the residual stream; zeros if it is left out."""
    output_BTD: Tensor

    @property
    def num_tokens(self) -> int:
        return self.output_BTD[..., 0].numel()


class Stream:
    """A model for inference, any range of its layers over any text.

    Args:
        source: the parent, or a child on disk opened like one.
        folder: for hidden states, FOLDER/TEXT/BATCH.safetensors; `close` deletes it.
        reserved_bytes: memory that the caller needs beside the model all the time.
        dtype: of weights and hidden states; None: the recipe's `precision`.
    """

    def __init__(
        self, run: Run, source: Parent, folder: Path, reserved_bytes: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        self._run, self._source, self._folder = run, source, folder
        dtype = dtype or getattr(torch, run.recipe.precision)
        self.layer_bytes = [dtype.itemsize * block.num_params(source.config) for block in source.architecture.blocks]
        self.outer_bytes = dtype.itemsize * source.num_params - sum(self.layer_bytes)
        """Of embeddings, final norm and head, which are always held."""
        room = memory_bytes(run.device, run.recipe.execution.memory)  # asked before any weights are loaded
        self._room = room - reserved_bytes - self.outer_bytes
        self.resident = sum(self.layer_bytes) <= self._room
        self.model = source.load(dtype=dtype, device=run.device, layers=None if self.resident else ())
        self.layers = cast(Sequence[PuzzleDecoderLayer], self.model.model.layers)
        self.num_layers = source.num_layers

    def room(self, layers: Iterable[int]) -> int:
        """Bytes that are left while these layers are held."""
        return self._room - sum(self.layer_bytes if self.resident else (self.layer_bytes[layer] for layer in layers))

    def groups(
        self, layers: Iterable[int], extra_bytes: Callable[[int], int], begun: Collection[int] = ()
    ) -> Iterator[range]:
        """Ranges of layers, each as long as its weights and `extra_bytes` fit the memory, but at least one layer.

        Ranges of a streamed model have no layer that is not asked for.

        Args:
            extra_bytes: what a layer needs beside its own weights.
            begun: layers that an attempt before this one was at; they come first, in ranges of their own.
        """
        own = [0] * self.num_layers if self.resident else self.layer_bytes
        for part in ([each for each in layers if each in begun], [each for each in layers if each not in begun]):
            for _, run in groupby(enumerate(part), key=lambda pair: 0 if self.resident else pair[1] - pair[0]):
                for group in packed([i for _, i in run], lambda i: extra_bytes(i) + own[i], self.room(())):
                    yield range(group[0], group[-1] + 1)

    def hold(self, layers: Collection[int], weights: Mapping[int, State] | None = None) -> None:
        """Hold the weights of these layers, which may have been read before; of a streamed model, of no others."""
        if self.resident:
            return
        for index, layer in enumerate(self.layers):
            if index not in layers:
                layer.to("meta")
        for index in layers:
            layer = self.layers[index]
            if any(parameter.is_meta for parameter in layer.parameters()):
                layer.load_state_dict((weights or self._read([index]))[index], assign=True)
                layer.requires_grad_(False)

    def walk(self, layers: range, reserved_bytes: int = 0) -> Iterator[range]:
        """`layers` in order, held as many at a time as fit twice beside `reserved_bytes`; a thread reads the next."""
        if self.resident:
            yield layers
            return
        groups = packed(layers, lambda layer: 2 * self.layer_bytes[layer], self._room - reserved_bytes)
        for group, weights in read_ahead(groups, self._read):
            self.hold(group, weights)
            weights.clear()
            yield range(group[0], group[-1] + 1)
            self.hold(())

    def _read(self, layers: Iterable[int]) -> dict[int, State]:
        return {i: self._source.layer_state(i, self.model.dtype, self.model.device) for i in layers}

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The inputs of layer 0."""
        return self.model.embed(tokens_BT.to(self.model.device))

    def prepare(self, layer: int, texts: Texts) -> None:
        """Have the inputs of `layer` on disk for every batch of `texts`; those of layer 0 are embeddings, not kept.

        Goes on from the nearest layer before it that is on disk, also in the middle of a text after a kill. Inputs of
        a later layer are deleted. A streamed model holds no layer afterwards.
        """
        for file in (file for name in texts for file in (self._folder / name).glob("*.safetensors")):
            if self._reached(file) > layer:
                file.unlink()
        if layer == 0:
            return
        files = (self._file(name, batch) for name, batches in texts.items() for batch, _ in enumerate(batches()))
        first = min(map(self._reached, files), default=layer)
        if first < layer:
            self.check_disk(texts)
        for group in self.walk(range(first, layer)):
            self.advance(texts, group, self.forward)

    @torch.no_grad()
    def advance(self, texts: Texts, layers: range, forward: Callable[[range, Tensor], Tensor]) -> None:
        """Replace the states of texts on disk by what leaves the last of `layers`, batch by batch, if it is not there.

        Args:
            forward: runs hidden states through a range of layers, from the one that a batch has reached.
        """
        for text, batches in texts.items():
            (self._folder / text).mkdir(parents=True, exist_ok=True)
            behind = (each for each in enumerate(batches()) if self._reached(self._file(text, each[0])) < layers.stop)
            for (batch, _), (layer, hidden_BTD) in read_ahead(behind, partial(self._states, text)):
                output_BTD = forward(range(layer, layers.stop), hidden_BTD)
                states = {"hidden_BTD": output_BTD, "layer": torch.tensor(layers.stop)}
                # They can be computed again, so that nothing waits until they are on the disk itself.
                write_tensors(self._file(text, batch), states, flush=False)

    def _file(self, text: str, batch: int) -> Path:
        return self._folder / text / f"{batch:06d}.safetensors"

    def _reached(self, file: Path) -> int:
        """The layer whose inputs it holds; 0 if it is not there."""
        if not file.exists():
            return 0
        with safe_open(file, "pt") as handle:
            return int(handle.get_tensor("layer"))

    @torch.no_grad()
    def _states(self, text: str, numbered_BT: tuple[int, Tensor]) -> tuple[int, Tensor]:
        """The layer that a batch has reached, 0 if it is not on disk, and its inputs."""
        file = self._file(text, numbered_BT[0])
        if not file.exists():
            return 0, self.embed(numbered_BT[1])
        states = read_tensors(file)
        return int(states["layer"]), states["hidden_BTD"].to(self.model.device)

    def inputs(self, layer: int, text: str, numbered_BT: tuple[int, Tensor]) -> Tensor:
        """The inputs of `layer` for a batch of a text that was prepared for it, by number and tokens. [B, T, D]"""
        reached, hidden_BTD = self._states(text, numbered_BT)
        assert reached == layer, f"{text} was prepared for layer {reached}, not {layer}"
        return hidden_BTD

    @torch.no_grad()
    def forward(self, layers: range, hidden_BTD: Tensor) -> Tensor:
        """The outputs of the last of `layers`, which are held."""
        context = self.model.model.context(hidden_BTD[:1])  # whose masks hold for any number of sequences
        for index in layers:
            hidden_BTD = self.layers[index](hidden_BTD, **context)
        return hidden_BTD

    def passes(
        self, layers: range, text: str, batches: Iterable[Tensor], first: int = 0
    ) -> Iterator[Iterator[LayerPass]]:
        """The way of each batch, from number `first` on, through `layers`, for whose first `text` was prepared."""
        self.hold(layers)
        numbered = islice(enumerate(batches), first, None)
        for _, hidden_BTD in read_ahead(numbered, partial(self.inputs, layers.start, text)):
            yield self.through(layers, hidden_BTD)

    def through(self, layers: range, hidden_BTD: Tensor) -> Iterator[LayerPass]:
        """Each of `layers` in order. Gradients are off for this model alone: the caller may train beside it."""
        with torch.no_grad():
            context = self.model.model.context(hidden_BTD[:1])
        for index in layers:
            layer = self.layers[index]
            inputs_BTD, added_BTD = {}, {}
            with torch.no_grad():
                for which in SUBBLOCKS:
                    inputs_BTD[which] = hidden_BTD
                    added_BTD[which] = layer.subblock_output(which, hidden_BTD, **context)
                    hidden_BTD = hidden_BTD + added_BTD[which]
            yield LayerPass(index, layer, context, inputs_BTD, added_BTD, hidden_BTD)

    def finals(self, text: str, batches: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The outputs of the last layer, batch by batch; on disk only if the model is streamed. [B, T, D]"""
        last = self.num_layers
        if self.resident:
            return (self.forward(range(last), self.embed(tokens_BT)) for tokens_BT in batches())
        self.prepare(last, {text: batches})
        return (self.inputs(last, text, numbered_BT) for numbered_BT in enumerate(batches()))

    def close(self) -> None:
        """Delete what was kept on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def check_disk(self, texts: Texts) -> None:
        """Refuse what does not fit `execution.disk`: the inputs of one layer for every text, beside those of others."""
        tokens = sum(tokens_BT.numel() for batches in texts.values() for tokens_BT in batches())
        needed = tokens * self._source.config.hidden_size * self.model.dtype.itemsize
        allowed = disk_bytes(self._run.path, disk := self._run.recipe.execution.disk)
        for file in self._folder.glob("*/*.safetensors"):
            needed += 0 if file.parent.name in texts else file.stat().st_size
            if disk is None:  # what is free does not hold what is here already
                allowed += file.stat().st_size
        if needed > allowed:
            raise PuzzleError(
                f"execution.disk: the activations of {tokens:,} tokens ({', '.join(texts)}) take "
                f"{format_bytes(needed)}, allowed are {format_bytes(allowed)}; raise execution.disk or "
                "execution.memory, or take fewer tokens"
            )
