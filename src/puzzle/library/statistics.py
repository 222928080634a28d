"""Calibration: moments of the parent's activations, from which variants start (paper section 2.1, appendix A).

D hidden size, I intermediate size, N tokens of a batch. Per layer and subblock, over all calibration tokens, with h the
normed input and y the subblock's output:

    input_mean [D] = E[h]                input_second_moment [D, D] = E[h h^T]
    output_mean [D] = E[y]               cross_moment [D, D] = E[y h^T]
    output_power [] = E[y^2], per element

what the parent's variant records for smaller forms of itself (`Variant.record`): of a gated FFN, a being the inputs of
its down projection, and of attention, o_g being the outputs of the query heads that share KV head g,

    activation_mean_abs [I] = E|a|       activation_second_moment [I, I] = E[a a^T]
    group_contribution [KV heads] = E||W_o[:, g] o_g||

and per layer, x being its input and x' its output:

    influence [] = 1 - E[cos(x, x')] (block influence, ShortGPT)
    block_power [] = E[x'^2]             block_contribution_power [] = E[(x' - x)^2], both per element

The sums of a layer take 32 D^2 + 4 I^2 bytes while it is in use, and as many layers are in use together as fit the
memory. Products are float32 and sums float64, from which means can be subtracted without loss; only the moment of
activations, the largest by far and never centred, is summed in float32. Measured against float64 throughout (I = 384,
three channels 100 times the rest, 2026-11-21): 4e-6 of sqrt(C_ii C_jj) off after 8192 batches, and a down projection
solved from it (damping 1e-3) loses 4e-8 more.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from puzzle.data import TokenData
from puzzle.distributed.state import SaveTimer
from puzzle.distributed.tasks import for_layers
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.parents import Parent
from puzzle.runs import Run, progress, read_tensors, write_tensors
from puzzle.stages import CALIBRATE
from puzzle.streams import LayerPass, Stream
from puzzle.variants import SUBBLOCKS, ParentSubblock, Start, State, Subblock, Variant, add_sum, split_state

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Statistics:
    """The moments on disk, one file a layer."""

    path: Path
    address: str

    def file(self, layer: int) -> Path:
        return self.path / f"layer{layer:03d}.safetensors"

    def subblock(self, layer: int, subblock: Subblock) -> State:
        prefix = f"{subblock}."
        tensors = read_tensors(self.file(layer))
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def layer(self, layer: int) -> State:
        """Those of the whole layer: `influence`, `block_power`, `block_contribution_power`."""
        return {name: value for name, value in read_tensors(self.file(layer)).items() if "." not in name}

    def parent_subblock(
        self, parent: Parent, start: Start, device: torch.device, layer: int, subblock: Subblock
    ) -> ParentSubblock:
        """What the variants of a subblock start from, on the device where closed forms are solved."""
        state, moments = split_state(parent.layer_state(layer), subblock), self.subblock(layer, subblock)
        return ParentSubblock(
            config=parent.config,
            variant=parent.architecture.blocks[layer].subblock(subblock),
            state={name: value.to(device) for name, value in state.items()},
            statistics={name: value.to(device) for name, value in moments.items()},
            start=start,
        )

    def influence(self, num_layers: int) -> list[float]:
        """Block influence of every layer: how far it turns the residual stream."""
        return [float(self.layer(layer)["influence"]) for layer in range(num_layers)]


def calibrate(run: Run, parent: Parent, data: TokenData) -> Statistics:
    """Gather the moments of every layer, in one pass of the parent over the calibration text if memory allows."""
    stage = run.open(CALIBRATE, parent=parent, data=data)
    statistics = Statistics(stage.path, stage.address)
    if not stage.done:
        calibration = _Calibration(run, parent, data, statistics)
        for_layers(run, stage, calibration, [1.0 + size for size in calibration.sum_bytes()])
        stage.commit(tokens=calibration.num_tokens())
    return statistics


@dataclass(frozen=True)
class _Calibration:
    """A task for any range of layers, also in another process."""

    run: Run
    parent: Parent
    data: TokenData
    statistics: Statistics

    def text(self) -> Iterator[Tensor]:
        for sequences in self.data.batches("calibration", _BATCH_SIZE, self.run.recipe.calibration.tokens):
            yield sequences[:, :-1]

    def num_tokens(self) -> int:
        return sum(tokens_BT.numel() for tokens_BT in self.text())

    def sum_bytes(self) -> list[int]:
        """Of the matrices among the sums, by layer."""
        config = self.parent.config
        recorded = [
            sum(block.subblock(which).recorded_values(config) for which in SUBBLOCKS)
            for block in self.parent.architecture.blocks
        ]
        return [32 * config.hidden_size**2 + 4 * values for values in recorded]

    def __call__(self, layers: range, folder: Path) -> None:
        missing = [layer for layer in layers if not self.statistics.file(layer).exists()]
        if not missing:
            return
        stream, file = Stream(self.run, self.parent, folder / "activations"), folder / "partial.safetensors"
        begun = {layer for layer, _ in _Sums.read(file).moments}
        for group in stream.groups(missing, self.sum_bytes().__getitem__, begun):
            stream.prepare(group.start, {"calibration": self.text})
            stream.hold(group)
            sums = self._sums(file, stream, group)
            for layer in group:
                self._write(layer, sums)
        stream.close()

    @torch.no_grad()
    def _sums(self, file: Path, stream: Stream, layers: range) -> "_Sums":
        """Over the tokens of the text; goes on after a kill."""
        sums = _Sums.read(file, stream.model.device)
        if {layer for layer, _ in sums.moments} != set(layers):
            sums = _Sums()
        timer = SaveTimer(sum(self.sum_bytes()[layer] for layer in layers))
        label = "calibrate" if len(layers) == stream.num_layers else f"calibrate layers {layers[0]}-{layers[-1]}"
        passes = stream.passes(layers, "calibration", self.text(), sums.batches)
        with progress(label, self.num_tokens(), sums.tokens) as bar, _hooks(stream, self.parent, layers) as inside:
            for layer_passes in passes:
                for seen in layer_passes:
                    _add_layer(sums.moments[seen.index, ""], seen)
                    for which in SUBBLOCKS:
                        variant = self.parent.architecture.blocks[seen.index].subblock(which)
                        _add_subblock(sums.moments[seen.index, which], seen, variant, inside[seen.index, which])
                tokens = seen.input_BTD[..., 0].numel()
                sums.batches, sums.tokens = sums.batches + 1, sums.tokens + tokens
                bar.advance(tokens)
                if timer.due():
                    with timer.saving():
                        sums.write(file)
        return sums

    def _write(self, layer: int, sums: "_Sums") -> None:
        moments = {
            f"{which}.{name}".removeprefix("."): total.div_(sums.tokens).float()
            for which in ("", *SUBBLOCKS)
            for name, total in sums.moments.pop((layer, which), {}).items()
        }
        if not all(moment.sum(dtype=torch.float64).isfinite() for moment in moments.values()):
            raise PuzzleError(f"parent: the activations of layer {layer} are not finite; get a sound checkpoint")
        write_tensors(self.statistics.file(layer), moments)


@dataclass
class _Sums:
    """Sums over the tokens of so many batches."""

    moments: dict[tuple[int, str], State] = field(default_factory=lambda: defaultdict(dict))
    """By layer and subblock; the subblock is empty for those of a whole layer."""
    batches: int = 0
    tokens: int = 0

    @classmethod
    def read(cls, file: Path, device: torch.device | str = "cpu") -> "_Sums":
        """What `write` kept; nothing, if there is no file."""
        sums = cls()
        for full_name, value in (read_tensors(file) if file.exists() else {}).items():
            layer, which, name = full_name.split(".")
            if name in ("batches", "tokens"):
                setattr(sums, name, int(value))
            else:
                sums.moments[int(layer), which][name] = value.to(device)
        return sums

    def write(self, file: Path) -> None:
        counts = {"..batches": torch.tensor(self.batches), "..tokens": torch.tensor(self.tokens)}
        named = {f"{i}.{which}.{name}": v for (i, which), state in self.moments.items() for name, v in state.items()}
        write_tensors(file, counts | named)


@contextmanager
def _hooks(stream: Stream, parent: Parent, layers: range) -> Iterator[dict[tuple[int, Subblock], dict[str, Any]]]:
    """By layer and subblock, what its last pass saw: the normed input, and the inputs that its variant records."""
    inside: dict[tuple[int, Subblock], dict[str, Any]] = {}
    with ExitStack() as handles:
        for index, which in product(layers, SUBBLOCKS):
            layer = cast(PuzzleDecoderLayer, stream.model.model.layers[index])
            seen = inside[index, which] = {}
            if (norm := layer.norm_of(which)) is not None:
                hook = norm.register_forward_hook(lambda _, __, output, seen=seen: seen.update(normed=output))
                handles.callback(hook.remove)
            if (name := parent.architecture.blocks[index].subblock(which).recorded) is not None:
                recorded = layer.get_submodule(name)
                hook = recorded.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(recorded=inputs))
                handles.callback(hook.remove)
        yield inside


def _add_layer(sums: State, seen: LayerPass) -> None:
    """The sums of a batch that are of the whole layer."""
    input_ND, output_ND = seen.input_BTD.float().flatten(0, 1), seen.output_BTD.float().flatten(0, 1)
    add_sum(sums, "influence", (1 - cosine_similarity(input_ND, output_ND, dim=-1)).sum())
    add_sum(sums, "block_power", output_ND.square().mean(-1).sum())
    add_sum(sums, "block_contribution_power", (output_ND - input_ND).square().mean(-1).sum())


def _add_subblock(sums: State, seen: LayerPass, variant: Variant, inside: dict[str, Any]) -> None:
    """Those of one subblock; none if it is left out in the parent."""
    if "normed" not in inside:
        return
    h_ND = inside.pop("normed").float().flatten(0, 1)
    y_ND = seen.subblock_output(variant.subblock).float().flatten(0, 1)
    add_sum(sums, "input_mean", h_ND.sum(0))
    add_sum(sums, "input_second_moment", h_ND.T @ h_ND)
    add_sum(sums, "output_mean", y_ND.sum(0))
    add_sum(sums, "cross_moment", y_ND.T @ h_ND)
    add_sum(sums, "output_power", y_ND.square().mean(-1).sum())
    variant.record(sums, seen.layer, *inside.pop("recorded", ()))
