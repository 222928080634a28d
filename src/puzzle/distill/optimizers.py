"""The optimisers of GKD."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.recipe import DistilSettings
from puzzle.training import BETAS


def build_optimizers(settings: DistilSettings, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
    """`distil.optimizer` over the named parameters; matrices decay, vectors do not.

    Muon orthogonalises the updates of the layers' matrices, scaled so that they are as large as AdamW's (Muon is
    Scalable, arXiv 2502.16982): one learning rate serves both.
    """
    match settings.optimizer:
        case "adamw":
            return [_adamw(settings, list(parameters.values()))]
        case "adamw8bit" if Group.current().size > 1:
            raise PuzzleError("distil.optimizer: adamw8bit is for one process; use adamw or muon, or no torchrun")
        case "adamw8bit":
            return [cast(Optimizer, _AdamW8bit(settings, list(parameters.values())))]
        case "muon":
            matrices = {name for name, value in parameters.items() if value.ndim == 2 and ".layers." in name}
            others = _adamw(settings, [value for name, value in parameters.items() if name not in matrices])
            if not matrices:
                return [others]
            muon = torch.optim.Muon(
                [parameters[name] for name in sorted(matrices)],
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            return [others, muon]


def _adamw(settings: DistilSettings, parameters: Sequence[Tensor]) -> Optimizer:
    return torch.optim.AdamW(_groups(settings, parameters), betas=BETAS, fused=True)


def _groups(settings: DistilSettings, parameters: Sequence[Tensor]) -> list[dict[str, object]]:
    decayed = [value for value in parameters if value.ndim > 1]
    others = [value for value in parameters if value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class _AdamW8bit:
    """torchao's AdamW with moments of 8 bits, and its `state` as plain tensors, which is what training state holds."""

    def __init__(self, settings: DistilSettings, parameters: Sequence[Tensor]) -> None:
        try:
            kind = import_module("torchao.optim").AdamW8bit
        except ImportError:
            raise PuzzleError(
                "distil.optimizer: adamw8bit needs the package torchao: pip install torchao, or use adamw"
            ) from None
        self._optimizer: Any = kind(_groups(settings, parameters), betas=BETAS)
        self.state = _States(self._optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def step(self) -> None:
        self._optimizer.step()


class _States:
    """Each parameter's state, by parameter."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._optimizer.state

    def __getitem__(self, parameter: Tensor) -> "_State":
        return _State(self._optimizer, parameter)

    def __setitem__(self, parameter: Tensor, value: dict[str, Tensor]) -> None:
        self._optimizer.state[parameter] = value


class _State:
    """One parameter's state: `step`, `exp_avg:codes`, `exp_avg:scale`, ..."""

    def __init__(self, optimizer: Any, parameter: Tensor) -> None:
        self._optimizer, self._parameter = optimizer, parameter

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for key, value in self._optimizer.state[self._parameter].items():
            if type(value) is Tensor:  # small ones have moments of 32 bits
                yield key, value
            else:
                for part in value.__tensor_flatten__()[0]:
                    yield f"{key}:{part}", getattr(value, part)

    def __setitem__(self, name: str, value: Tensor) -> None:
        key, _, part = name.partition(":")
        state = self._optimizer.state[self._parameter]
        if not part:
            state[key] = value
            return
        if key not in state:
            state[key] = self._optimizer._new_buffer(self._parameter, key == "exp_avg")  # the first moment has a sign
        getattr(state[key], part).copy_(value)
