"""Calibration: moments of the parent's activations, from which variants start (paper section 2.1, appendix A).

D hidden size, I intermediate size, N tokens of a batch. Per layer and subblock, over all calibration tokens, with h the
normed input and y the subblock's output:

    input_mean [D] = E[h]                input_second_moment [D, D] = E[h h^T]
    output_mean [D] = E[y]               cross_moment [D, D] = E[y h^T]
    output_power [] = E[y^2], per element

of the inputs a of the module that the parent's variant names (`Variant.recorded`), an output or down projection,

    activation_mean_abs [I] = E|a|       activation_second_moment [I, I] = E[a a^T]

and per layer, x being its input and x' its output:

    influence [] = 1 - E[cos(x, x')] (block influence, ShortGPT)
    block_power [] = E[x'^2]             block_contribution_power [] = E[(x' - x)^2], both per element

The sums of a layer take 32 D^2 + 4 I^2 bytes while it is in use, I of both subblocks. Products are float32 and sums
float64, from which means can be subtracted without loss; only the moments of activations, never centred, are summed in
float32 (what that loses: benchmarks/large_parent.md). A GPU multiplies bfloat16 states in TF32, which holds
them exactly, if the text's first batch shows that its sums are good enough.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from puzzle.data import TokenData
from puzzle.device import rows_at_once, tf32
from puzzle.distributed.state import SaveTimer
from puzzle.distributed.tasks import for_layers
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run, progress, read_tensors, write_tensors
from puzzle.stages import CALIBRATE
from puzzle.streams import LayerPass, Stream
from puzzle.variants import SUBBLOCKS, ParentSubblock, State, Subblock, add_sum, split_state

_BATCH_SIZE = 8
_ALLOWED_ERROR = 3e-5
"""Of a moment in TF32, as a share of sqrt(C_ii C_jj): a down projection loses 6e-8 (benchmarks/large_parent.md)."""


@dataclass(frozen=True)
class Statistics:
    """The moments on disk, one file a layer."""

    path: Path
    address: str

    def file(self, layer: int) -> Path:
        return self.path / f"layer{layer:03d}.safetensors"

    def moments(self, layer: int, subblock: Subblock | None = None) -> State:
        """Those of a subblock; or of the whole layer: `influence`, `block_power`, `block_contribution_power`."""
        named = {name.rpartition(".")[::2]: value for name, value in read_tensors(self.file(layer)).items()}
        # Copied, since a part of a file keeps all of it mapped.
        return {moment: value.clone() for (which, moment), value in named.items() if which == (subblock or "")}

    def parent_subblock(
        self, parent: Parent, settings: LibrarySettings, device: torch.device, layer: int, subblock: Subblock
    ) -> ParentSubblock:
        """What the variants of a subblock start from, on the device where closed forms are solved."""
        state, moments = split_state(parent.layer_state(layer), subblock, parent.config), self.moments(layer, subblock)
        return ParentSubblock(
            config=parent.config,
            variant=parent.architecture.blocks[layer].subblock(subblock),
            state={name: value.to(device) for name, value in state.items()},
            statistics={name: value.to(device) for name, value in moments.items()},
            settings=settings,
        )


def calibrate(run: Run, parent: Parent, data: TokenData) -> Statistics:
    """Gather the moments of every layer, in one pass of the parent over the calibration text if memory allows."""
    stage = run.open(CALIBRATE, parent=parent, data=data)
    statistics = Statistics(stage.path, stage.address)
    if not stage.done:
        task = partial(_calibrate_layers, run, parent, data, statistics)
        for_layers(run, stage, task, [1.0 + size for size in _sum_bytes(parent)])
        stage.commit()
    return statistics


def _sum_bytes(parent: Parent) -> list[int]:
    """Of the matrices among a layer's sums."""
    config = parent.config
    recorded = [sum(v.recorded_values(config) for v in block.subblocks) for block in parent.architecture.blocks]
    return [32 * config.hidden_size**2 + 4 * values for values in recorded]


@torch.no_grad()
def _calibrate_layers(
    run: Run, parent: Parent, data: TokenData, statistics: Statistics, layers: range, folder: Path
) -> None:
    """The task of a range of layers, also in another process: those that have no file yet."""
    missing = [layer for layer in layers if not statistics.file(layer).exists()]
    if not missing:
        return
    stream, file = Stream(run, parent, folder / "activations"), folder / "partial.safetensors"
    text = partial(data.inputs, "calibration", _BATCH_SIZE, run.recipe.calibration.tokens)
    sum_bytes, settings = _sum_bytes(parent), run.recipe.calibration
    num_tokens = data.num_sequences("calibration", settings.tokens) * data.sequence_length
    for group in stream.groups(missing, sum_bytes.__getitem__, _read(file)[1]):
        stream.prepare(group.start, {"calibration": text})
        fast = _suits_tf32(run, stream.inputs(group.start, "calibration", (0, next(iter(text())))))
        batches, sums = _read(file, stream.model.device)
        if sums.keys() != set(group):
            batches, sums = 0, {layer: {} for layer in group}
        timer = SaveTimer(sum(sum_bytes[layer] for layer in group))
        label = "calibrate" if len(group) == stream.num_layers else f"calibrate layers {group[0]}-{group[-1]}"
        handles = [
            stream.layers[layer]
            .get_submodule(recorded)
            .register_forward_pre_hook(partial(_record, f"{variant.subblock}.", sums[layer], fast))
            for layer in group
            for variant in parent.architecture.blocks[layer].subblocks
            if (recorded := variant.recorded(parent.config)) is not None
        ]
        with progress(label, num_tokens, batches * _BATCH_SIZE * data.sequence_length) as bar:
            passes = stream.passes(group, "calibration", text(), batches)
            for number, layer_passes in enumerate(passes, batches + 1):
                for seen in layer_passes:
                    _add(sums[seen.index], seen, fast)
                bar.advance(seen.num_tokens)
                if timer.due():
                    with timer.saving():
                        named = {f"{layer}.{name}": v for layer in group for name, v in sums[layer].items()}
                        write_tensors(file, named | {"batches": torch.tensor(number)})
        for handle in handles:
            handle.remove()
        for layer in group:
            totals = sums.pop(layer)  # popped one by one: there is no room for all of them twice
            moments = {name: totals.pop(name).div_(num_tokens).float() for name in [*totals]}
            if not all(moment.sum(dtype=torch.float64).isfinite() for moment in moments.values()):
                raise PuzzleError(f"parent: the activations of layer {layer} are not finite; get a sound checkpoint")
            write_tensors(statistics.file(layer), moments)
    stream.close()


def _read(file: Path, device: torch.device | str = "cpu") -> tuple[int, dict[int, State]]:
    """The number of batches that were saved, and their sums by layer; nothing, if there is no file."""
    sums: dict[int, State] = defaultdict(dict)
    saved = read_tensors(file) if file.exists() else {}
    batches = int(saved.pop("batches", 0))
    for name, value in saved.items():
        layer, _, moment = name.partition(".")
        sums[int(layer)][moment] = value.to(device)
    return batches, sums


def _suits_tf32(run: Run, hidden_BTD: Tensor) -> bool:
    """Whether moments may be multiplied in TF32: that of a layer's inputs, on a batch, shows the error of its sums."""
    if hidden_BTD.dtype != torch.bfloat16:  # TF32 would cut the numbers themselves
        return False
    hidden_ND = hidden_BTD.float().flatten(0, 1)
    exact_DD, found_DD = (torch.stack([*_products(hidden_ND, hidden_ND, fast)]).sum(0) for fast in (False, True))
    scale_D = exact_DD.diagonal().sqrt()
    error = float(((found_DD - exact_DD).abs() / torch.outer(scale_D, scale_D)).nan_to_num().max())
    if error > _ALLOWED_ERROR:
        run.log(f"calibrate: moments in TF32 are off by {error:.1e}; products in full float32 take longer")
    return error <= _ALLOWED_ERROR


def _products(left_NI: Tensor, right_NJ: Tensor, fast: bool) -> Iterator[Tensor]:
    """The parts of left.T @ right, to be added up."""
    size = rows_at_once(left_NI.device)
    for left, right in zip(left_NI.split(size), right_NJ.split(size), strict=True):
        with tf32(fast):
            product_IJ = left.T @ right
        yield product_IJ


def _record(prefix: str, sums: State, fast: bool, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A hook: add the moments of what enters a module. The second is summed in float32."""
    activation_NI = inputs[0].float().flatten(0, -2)
    add_sum(sums, f"{prefix}activation_mean_abs", activation_NI.abs().sum(0))
    name, channels = f"{prefix}activation_second_moment", activation_NI.shape[1]
    if name not in sums:
        sums[name] = activation_NI.new_zeros(channels, channels)
    for part in activation_NI.split(rows_at_once(activation_NI.device)):
        with tf32(fast):
            sums[name].addmm_(part.T, part)


def _add(sums: State, seen: LayerPass, fast: bool) -> None:
    """Add the other moments of a batch."""
    input_ND, output_ND = (each.float().flatten(0, 1) for each in (seen.inputs_BTD["attention"], seen.output_BTD))
    add_sum(sums, "influence", (1 - cosine_similarity(input_ND, output_ND, dim=-1)).sum())
    add_sum(sums, "block_power", output_ND.square().mean(-1).sum())
    add_sum(sums, "block_contribution_power", (output_ND - input_ND).square().mean(-1).sum())
    for which in SUBBLOCKS:
        if which not in seen.layer.norm_names:  # the parent has left it out
            continue
        normed_BTD = seen.layer.normed(which, seen.inputs_BTD[which])
        h_ND, y_ND = (each.float().flatten(0, 1) for each in (normed_BTD, seen.added_BTD[which]))
        add_sum(sums, f"{which}.input_mean", h_ND.sum(0))
        add_sum(sums, f"{which}.output_mean", y_ND.sum(0))
        for name, left_ND in (("input_second_moment", h_ND), ("cross_moment", y_ND)):
            for product_DD in _products(left_ND, h_ND, fast):
                add_sum(sums, f"{which}.{name}", product_DD)
        add_sum(sums, f"{which}.output_power", y_ND.square().mean(-1).sum())
