"""All widths of one layer's gated FFN in one student: they share gate and up projections.

Channels are in order of importance, so that width w is the first w of them; the activations of the largest width serve
all. Each width has a down projection of its own: shared too, it ends worse than the closed-form start (measured on a 5M
Llama, 2026-11).

Shapes: B batch, T tokens, D hidden size, I largest width, w a width.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from puzzle.library.students import Student
from puzzle.modeling import PuzzleConfig
from puzzle.parents import LayerPass
from puzzle.variants import GatedFFN, State, build_subblock

_SHARED = ("mlp.gate_proj.", "mlp.up_proj.")
"""What the names begin with of tensors that have a row a channel."""
_DOWN = "mlp.down_proj."


class ElasticStudent(Student):
    """Several widths of one layer's gated FFN, learning the parent's contribution of that subblock.

    Args:
        widths: their channels must nest, as those of one ranking do.
        starts: each width's own start, by name; its channels in the parent's order.
        power: calibrated E[y^2] of the parent's contribution, per element.
    """

    def __init__(
        self,
        layer: int,
        widths: Sequence[GatedFFN],
        config: PuzzleConfig,
        starts: Mapping[str, State],
        power: float,
        device: torch.device,
    ) -> None:
        self.layer, self.subblock = layer, "ffn"
        self._widths, self.power = tuple(widths), power
        by_size = sorted(widths, key=lambda width: width.intermediate_size)
        orders = _nested_orders([starts[width.name] for width in by_size])
        largest = _reordered(starts[by_size[-1].name], orders[-1])
        # With nothing in place of its down projection, the FFN of the largest width gives the activations. [B, T, I]
        self._trunk = build_subblock(by_size[-1], config, _copied(largest, device))
        self._trunk.mlp.down_proj = nn.Identity()
        self._trunk.requires_grad_(True)
        self._downs: dict[str, nn.Linear] = {}
        for width, order in zip(by_size, orders, strict=True):
            state = _copied(_reordered(starts[width.name], order), device)
            weight, bias = state[f"{_DOWN}weight"], state.get(f"{_DOWN}bias")
            down = nn.Linear(width.intermediate_size, config.hidden_size, bias is not None, device="meta")
            down.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
            self._downs[width.name] = down.requires_grad_(True)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(width.name for width in self._widths)

    def parameters(self) -> dict[str, Tensor]:
        downs = {
            f"{_DOWN}{w}.{name}": value for w, down in self._downs.items() for name, value in down.named_parameters()
        }
        return dict(self._trunk.named_parameters()) | downs

    def target(self, seen: LayerPass) -> Tensor:
        return seen.ffn_BTD

    def losses(self, seen: LayerPass) -> dict[str, Tensor]:
        target_BTD = self.target(seen).float()
        return {
            name: (self._downs[name](input_BTI).float() - target_BTD).square().mean() / self.power
            for name, input_BTI in self.projection_inputs(seen).items()
        }

    def projections(self) -> dict[str, nn.Linear]:
        return self._downs

    def projection_inputs(self, seen: LayerPass) -> dict[str, Tensor]:
        activation_BTI = self._trunk.ffn_contribution(seen.middle_BTD.float())
        return {width.name: activation_BTI[..., : width.intermediate_size] for width in self._widths}

    def states(self) -> dict[str, State]:
        return {width.name: self._state(width) for width in self._widths}

    def _state(self, width: GatedFFN) -> State:
        """An ordinary gated FFN of this width: the first channels of what is shared, and its own down projection."""
        shared = {
            name: (value[: width.intermediate_size] if name.startswith(_SHARED) else value).detach().clone()
            for name, value in self._trunk.named_parameters()
        }
        down = {f"{_DOWN}{name}": value.detach().clone() for name, value in self._downs[width.name].named_parameters()}
        return shared | down


def _nested_orders(states: Sequence[State]) -> list[Tensor]:
    """For each width, narrowest first, the order of its channels in which every narrower width's come first. [w]"""
    channels = [_channels(state) for state in states]
    orders = [torch.arange(len(channels[0]))]
    for narrow, wide in pairwise(channels):
        first = _positions(narrow, wide)[orders[-1]]
        added = torch.ones(len(wide), dtype=torch.bool)
        added[first] = False
        orders.append(torch.cat([first, added.nonzero().flatten()]))
    return orders


def _channels(state: State) -> Tensor:
    """What tells a channel: its row in the gate and the up projection. [w, 2 D]"""
    return torch.cat([state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"]], dim=1)


def _positions(narrow: Tensor, wide: Tensor) -> Tensor:
    """Where the rows of `narrow` are among those of `wide`; both are in the parent's order."""
    positions: list[int] = []
    for position, row in enumerate(wide):
        if len(positions) < len(narrow) and torch.equal(row, narrow[len(positions)]):
            positions.append(position)
    assert len(positions) == len(narrow), "the channels of a narrower width are not among a wider one's"
    return torch.tensor(positions, dtype=torch.long)


def _reordered(state: State, order: Tensor) -> State:
    """The same FFN with its channels in another order."""
    reordered = dict(state)
    for name, value in state.items():
        if name.startswith(_SHARED):
            reordered[name] = value[order]
        elif name == f"{_DOWN}weight":
            reordered[name] = value[:, order].contiguous()
    return reordered


def _copied(state: State, device: torch.device) -> State:
    return {name: value.detach().to(device, copy=True) for name, value in state.items()}
