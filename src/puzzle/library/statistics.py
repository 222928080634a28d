"""Calibration: moments of the parent's activations, from which variants start (paper section 2.1, appendix A).

D hidden size, I intermediate size. Per layer and subblock, over all calibration tokens, with h the normed input and y
the contribution:

    input_mean [D] = E[h]                input_second_moment [D, D] = E[h h^T]
    output_mean [D] = E[y]               cross_moment [D, D] = E[y h^T]
    output_power [] = E[y^2], per element

of an FFN with a down projection, a being what enters that:

    activation_mean_abs [I] = E|a|       activation_second_moment [I, I] = E[a a^T]

of an attention with KV heads:

    group_contribution [KV heads] = E||W_o[:, g] o_g||, o_g being the outputs of the query heads that share KV head g

and per layer, x being its input and x' its output:

    influence [] = 1 - E[cos(x, x')] (block influence, ShortGPT)
    block_power [] = E[x'^2]             block_contribution_power [] = E[(x' - x)^2], both per element

The sums of a layer take 32 D^2 + 4 I^2 bytes while its turn lasts, and as many layers take turns together as fit the
memory. Products are float32 and sums float64, from which means can be taken off without loss; only the moment of
activations, the largest by far and never centred, is summed in float32. Measured against float64 throughout (I = 384,
three channels 100 times the rest, 2026-11-21): 4e-6 of sqrt(C_ii C_jj) off after 8192 batches, and a down projection
solved from it (damping 1e-3) loses 4e-8 more.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.errors import PuzzleError
from puzzle.parents import LayerPass, Parent, ParentPasses
from puzzle.runs import Run, progress, read_tensors, write_tensors
from puzzle.training import CHECKPOINT_INTERVAL_S
from puzzle.variants import GatedFFN, State, Subblock

_BATCH_SIZE = 8
_NORMS: tuple[tuple[Subblock, str], ...] = (("attention", "input_layernorm"), ("ffn", "post_attention_layernorm"))


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
        """What is of the whole layer: `influence`, `block_power`, `block_contribution_power`."""
        tensors = read_tensors(self.file(layer))
        return {name: value for name, value in tensors.items() if "." not in name}

    def influence(self, num_layers: int) -> list[float]:
        """Block influence of every layer: how far it turns the residual stream."""
        return [float(self.layer(layer)["influence"]) for layer in range(num_layers)]


def calibrate(run: Run, parent: Parent, data: TokenData) -> Statistics:
    """Gather the moments of every layer; one pass of the parent over the calibration text if memory allows."""
    settings = {"tokens": run.recipe.calibration.tokens, "precision": run.recipe.precision}
    stage = run.stage("calibrate", version=3, settings=settings, inputs=(parent.address, data.address))
    statistics = Statistics(stage.path, stage.address)
    if stage.done:
        return statistics

    text = partial(_text, data, run.recipe.calibration.tokens)
    costs = [1.0 + _sum_bytes(parent, layer) for layer in range(len(parent.architecture.blocks))]
    for_layers(run, stage, partial(_calibrate, run, parent, statistics, text), costs)
    stage.commit(tokens=sum(tokens_BT.numel() for tokens_BT in text()))
    return statistics


def _text(data: TokenData, tokens: int) -> Iterator[Tensor]:
    for sequences in data.batches("calibration", _BATCH_SIZE, tokens):
        yield sequences[:, :-1]


def _calibrate(
    run: Run, parent: Parent, statistics: Statistics, text: Callable[[], Iterable[Tensor]], layers: range, folder: Path
) -> None:
    """A task: the files of those layers that have none yet."""
    missing = [layer for layer in layers if not statistics.file(layer).exists()]
    if not missing:
        return
    begun = _layers_of(_read_partial(folder))
    passes = ParentPasses(run, parent, folder / "activations")
    # What was begun before a kill is ended first and together, though there may be more memory now than then.
    for part in ([i for i in missing if i in begun], [i for i in missing if i not in begun]):
        for group in passes.groups(part, lambda layer: _sum_bytes(parent, layer)):
            passes.prepare(group.start, {"calibration": text})
            passes.hold(group)
            _calibrate_layers(statistics, folder, passes, group, text)
    passes.close()


def _partial_file(folder: Path) -> Path:
    return folder / "partial.safetensors"


def _read_partial(folder: Path) -> State:
    """The sums of a group that was cut off; none, if none was."""
    return read_tensors(_partial_file(folder)) if _partial_file(folder).exists() else {}


def _layer_of(name: str) -> int:
    return int(name.partition(".")[0])


def _layers_of(sums: State) -> set[int]:
    return {_layer_of(name) for name in sums if name != "tokens"}


def _sum_bytes(parent: Parent, layer: int) -> int:
    ffn = parent.architecture.blocks[layer].ffn
    channels = ffn.intermediate_size if isinstance(ffn, GatedFFN) else 0
    return 32 * parent.config.hidden_size**2 + 4 * channels**2


def _calibrate_layers(
    statistics: Statistics,
    folder: Path,
    passes: ParentPasses,
    layers: range,
    calibration: Callable[[], Iterable[Tensor]],
) -> None:
    sums = _accumulate(folder, passes, layers, calibration)
    tokens = sums.pop("tokens").item()
    for layer in layers:
        names = [name for name in sums if _layer_of(name) == layer]
        moments = {name.partition(".")[2]: sums.pop(name).div_(tokens).float() for name in names}
        if not all(moment.sum(dtype=torch.float64).isfinite() for moment in moments.values()):
            raise PuzzleError(f"parent: the activations of layer {layer} are not finite; get a sound checkpoint")
        write_tensors(statistics.file(layer), moments)


@torch.no_grad()
def _accumulate(
    folder: Path, passes: ParentPasses, layers: range, calibration: Callable[[], Iterable[Tensor]]
) -> State:
    """Sums over the tokens of the text, named `layer.subblock.moment`, and how many these are; goes on after a kill."""
    saved = _read_partial(folder)
    sums: State = {}
    if _layers_of(saved) >= set(layers):
        mine = [name for name in saved if name == "tokens" or _layer_of(name) in layers]
        sums = {name: saved[name].to(passes.model.device) for name in mine}
    tokens_done = int(sums.get("tokens", 0))
    tokens_total = sum(tokens_BT.numel() for tokens_BT in calibration())
    last_save, save_seconds = time.monotonic(), 0.0
    label = "calibrate" if len(layers) == len(passes.layer_bytes) else f"calibrate layers {layers[0]}-{layers[-1]}"
    with progress(label, tokens_total, tokens_done) as bar, _Taps(passes, layers) as taps:
        seen = 0
        for index, tokens_BT in enumerate(calibration()):
            seen += tokens_BT.numel()
            if seen <= tokens_done:
                continue
            for layer_pass in passes.through(layers, "calibration", index, tokens_BT):
                _add_moments(sums, layer_pass, taps.take(layer_pass.index))
            sums["tokens"] = torch.tensor(seen)
            bar.advance(tokens_BT.numel())
            # Of a large parent the sums are tens of gigabytes: saving takes a tenth of the time at most.
            if time.monotonic() - last_save > max(CHECKPOINT_INTERVAL_S, 10 * save_seconds):
                begin = time.monotonic()
                write_tensors(_partial_file(folder), sums)
                last_save = time.monotonic()
                save_seconds = last_save - begin
    return sums


class _Taps:
    """What passes inside layers: the normed inputs, and what enters the last projections. By module and layer."""

    _INPUTS, _OUTPUTS = ("self_attn.o_proj", "mlp.down_proj"), ("input_layernorm", "post_attention_layernorm")

    def __init__(self, passes: ParentPasses, layers: range) -> None:
        self._handles: list[RemovableHandle] = []
        self._taken: dict[int, State] = {layer: {} for layer in layers}
        for index in layers:
            for name, module in passes.model.model.layers[index].named_modules():
                if name in self._INPUTS:
                    self._handles.append(module.register_forward_pre_hook(partial(self._keep_input, index, name)))
                elif name in self._OUTPUTS:
                    self._handles.append(module.register_forward_hook(partial(self._keep_output, index, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, layer: int) -> State:
        """Of the last pass through the layer, [B T, features] in float32."""
        taken, self._taken[layer] = self._taken[layer], {}
        return taken

    def _keep_input(self, layer: int, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._taken[layer][name] = inputs[0].float().flatten(0, 1)

    def _keep_output(self, layer: int, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._taken[layer][name] = output.float().flatten(0, 1)


def _add_moments(sums: State, seen: LayerPass, inside: State) -> None:
    """Add one layer's moments, over the tokens of a batch, to the sums."""

    def add(name: str, value: Tensor) -> None:
        full_name = f"{seen.index}.{name}"
        if full_name in sums:
            sums[full_name] += value
        else:
            sums[full_name] = value.double()

    entered_ND, left_ND = seen.entered_BTD.float().flatten(0, 1), seen.left_BTD.float().flatten(0, 1)
    add("influence", (1 - cosine_similarity(entered_ND, left_ND, dim=-1)).sum())
    add("block_power", left_ND.square().mean(-1).sum())
    add("block_contribution_power", (left_ND - entered_ND).square().mean(-1).sum())
    for subblock, norm in _NORMS:
        if (h_ND := inside.get(norm)) is not None:
            y_ND = seen.contribution(subblock).float().flatten(0, 1)
            add(f"{subblock}.input_mean", h_ND.sum(0))
            add(f"{subblock}.input_second_moment", h_ND.T @ h_ND)
            add(f"{subblock}.output_mean", y_ND.sum(0))
            add(f"{subblock}.cross_moment", y_ND.T @ h_ND)
            add(f"{subblock}.output_power", y_ND.square().mean(-1).sum())
    if (heads_NH := inside.get("self_attn.o_proj")) is not None:
        add("attention.group_contribution", _group_contributions(seen, heads_NH))
    if (activation_NI := inside.get("mlp.down_proj")) is not None:
        add("ffn.activation_mean_abs", activation_NI.abs().sum(0))
        name, channels = f"{seen.index}.ffn.activation_second_moment", activation_NI.shape[1]
        if name not in sums:
            sums[name] = activation_NI.new_zeros(channels, channels)
        sums[name].addmm_(activation_NI.T, activation_NI)


def _group_contributions(seen: LayerPass, heads_NH: Tensor) -> Tensor:
    """Sum over tokens of the norm of what each group's query heads add through their columns of o_proj. [KV heads]"""
    attention: Any = seen.layer.self_attn
    weight_DH = attention.o_proj.weight.float()
    groups: int = attention.k_proj.out_features // attention.head_dim
    parts = zip(heads_NH.chunk(groups, dim=1), weight_DH.chunk(groups, dim=1), strict=True)
    return torch.stack([(heads @ weight.T).norm(dim=1).sum() for heads, weight in parts])
