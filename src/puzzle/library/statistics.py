"""Calibration: moments of the parent's activations, from which variants start (paper section 2.1, appendix A).

D hidden size, I intermediate size. Per layer and half, over all calibration tokens, with h the normed input and y the
contribution:

    input_mean [D] = E[h]                input_second_moment [D, D] = E[h h^T]
    output_mean [D] = E[y]               cross_moment [D, D] = E[y h^T]
    output_power [] = E[y^2], per element
    activation_mean_abs [I] = E|a|       activation_second_moment [I, I] = E[a a^T]

(the last two for FFNs, a being the down projection's input)

and per layer `influence` [] = 1 - E[cos(x, x')] of its input x and output x' (block influence, ShortGPT).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from puzzle.blocks import Half, State
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, progress, read_tensors, write_tensors
from puzzle.training import CHECKPOINT_INTERVAL_S

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Statistics:
    """The moments on disk, one file a layer."""

    path: Path
    address: str

    def half(self, layer: int, half: Half) -> State:
        prefix = f"{half}."
        tensors = read_tensors(self.path / f"layer{layer:03d}.safetensors")
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def influence(self, num_layers: int) -> list[float]:
        """Block influence of every layer: how far it turns the residual stream."""
        files = (self.path / f"layer{layer:03d}.safetensors" for layer in range(num_layers))
        return [float(read_tensors(file)["influence"]) for file in files]


def calibrate(run: Run, parent: Parent, data: TokenData) -> Statistics:
    """Gather the moments of every layer in one pass of the parent over the calibration text."""
    settings = {"tokens": run.recipe.calibration.tokens, "precision": run.recipe.precision}
    stage = run.stage("calibrate", version=1, settings=settings, inputs=(parent.address, data.address))
    statistics = Statistics(stage.path, stage.address)
    if stage.done:
        return statistics
    model = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device)
    sums = _accumulate(run, model, data, stage.path / "partial.safetensors")
    tokens = sums.pop("tokens")
    for layer in range(len(model.model.layers)):
        prefix = f"{layer}."
        moments = {
            name.removeprefix(prefix): (total / tokens).float()
            for name, total in sums.items()
            if name.startswith(prefix)
        }
        if not all(moment.isfinite().all() for moment in moments.values()):
            raise PuzzleError(f"parent: the activations of layer {layer} are not finite; get a sound checkpoint")
        write_tensors(stage.path / f"layer{layer:03d}.safetensors", moments)
    (stage.path / "partial.safetensors").unlink(missing_ok=True)
    stage.commit(tokens=int(tokens))
    return statistics


@torch.no_grad()
def _accumulate(run: Run, model: PuzzleForCausalLM, data: TokenData, partial: Path) -> State:
    """Sums over tokens in float64, named `layer.half.moment`; resumes from `partial`."""
    sums = {name: tensor.to(run.device) for name, tensor in read_tensors(partial).items()} if partial.exists() else {}
    tokens_done = int(sums.get("tokens", torch.tensor(0)))
    tokens_total = min(run.recipe.calibration.tokens, data.num_sequences("calibration") * data.sequence_length)
    last_save = time.monotonic()
    with progress("calibrate", tokens_total, tokens_done) as bar:
        seen = 0
        for sequences in data.batches("calibration", _BATCH_SIZE, run.recipe.calibration.tokens):
            inputs = sequences[:, :-1].to(run.device)
            seen += inputs.numel()
            if seen <= tokens_done:
                continue
            for name, value in _moments(model, inputs):
                sums[name] = sums[name] + value.double() if name in sums else value.double()
            sums["tokens"] = torch.tensor(seen, dtype=torch.float64)
            bar.advance(inputs.numel())
            if time.monotonic() - last_save > CHECKPOINT_INTERVAL_S:
                write_tensors(partial, sums)
                last_save = time.monotonic()
    return sums


def _moments(model: PuzzleForCausalLM, tokens_BT: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Sums over one batch's tokens of what is averaged."""
    hidden_BTD = model.model.embed_tokens(tokens_BT)
    context = model.model.context(hidden_BTD)
    for index, layer in enumerate(model.model.layers):
        sums, hidden_BTD = _layer_moments(cast(PuzzleDecoderLayer, layer), hidden_BTD, context)
        for name, value in sums.items():
            yield f"{index}.{name}", value


def _layer_moments(layer: PuzzleDecoderLayer, entered_BTD: Tensor, context: dict[str, Any]) -> tuple[State, Tensor]:
    """One layer's sums, and its output."""
    sums: State = {}
    hidden_BTD = entered_BTD
    if layer.has_attention:
        normed_BTD = layer.input_layernorm(hidden_BTD)
        output_BTD, _ = layer.self_attn(hidden_states=normed_BTD, **context)
        sums |= _linear_moments("attention", normed_BTD, output_BTD)
        hidden_BTD = hidden_BTD + output_BTD
    if layer.has_ffn:
        normed_BTD = layer.post_attention_layernorm(hidden_BTD)
        output_BTD, activation_BTI = _ffn_with_activation(layer, normed_BTD)
        sums |= _linear_moments("ffn", normed_BTD, output_BTD)
        if activation_BTI is not None:
            activation = activation_BTI.float().flatten(0, 1)
            sums["ffn.activation_mean_abs"] = activation.abs().sum(0)
            sums["ffn.activation_second_moment"] = activation.T @ activation
        hidden_BTD = hidden_BTD + output_BTD
    sums["influence"] = (1 - cosine_similarity(entered_BTD.float(), hidden_BTD.float(), dim=-1)).sum()
    return sums, hidden_BTD


def _linear_moments(half: Half, normed_BTD: Tensor, output_BTD: Tensor) -> State:
    h, y = normed_BTD.float().flatten(0, 1), output_BTD.float().flatten(0, 1)
    return {
        f"{half}.input_mean": h.sum(0),
        f"{half}.input_second_moment": h.T @ h,
        f"{half}.output_mean": y.sum(0),
        f"{half}.cross_moment": y.T @ h,
        f"{half}.output_power": y.square().mean(-1).sum(),
    }


def _ffn_with_activation(layer: PuzzleDecoderLayer, normed_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
    """The FFN's output, and the input of its down projection if it has one."""
    captured: list[Tensor] = []
    projections = [module for name, module in layer.mlp.named_children() if name == "down_proj"]
    handles = [module.register_forward_pre_hook(lambda _, args: captured.append(args[0])) for module in projections]
    try:
        return layer.mlp(normed_BTD), captured[0] if captured else None
    finally:
        for handle in handles:
            handle.remove()
