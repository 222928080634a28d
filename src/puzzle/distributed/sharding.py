"""Models of which every process holds a share of each tensor (FSDP2); a process alone holds them whole."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from puzzle.device import mesh_type
from puzzle.distributed.group import Group


def shard(module: nn.Module, device: torch.device, products: torch.dtype | None = None) -> None:
    """Leave each process its share of the module's parameters, but for those that were sharded before.

    The module's `forward` gathers them and lets them go; gradients come out as the mean over all processes. Inner
    modules first; the outermost is the one to call. Call it on modules still without memory, and `fill` them.

    Args:
        products: the dtype in which parameters are gathered, if not their own; gradients are summed in float32.
    """
    if (size := Group.current().size) > 1:
        policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=_mesh(mesh_type(device), size), mp_policy=policy)


@lru_cache(maxsize=1)
def _mesh(device_type: str, size: int) -> DeviceMesh:
    return init_device_mesh(device_type, (size,))


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model without memory its parameters, one at a time: of each, this process keeps its share."""
    wanted = dict(model.named_parameters())
    state = {}
    for name, tensor in tensors:
        value, place = tensor.to(device, dtype), wanted[name]
        if isinstance(place, DTensor):
            # Every process has read the file: nothing needs to be sent.
            value = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
        state[name] = value
    model.load_state_dict(state, strict=False, assign=True)


def sync_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over all processes: once a step is enough."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def release(module: nn.Module) -> None:
    """Let go of what the outermost module's `forward` gathered and, without a backward pass, would keep."""
    if isinstance(module, FSDPModule):
        module.reshard()


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one at a time; the others get none of them."""
    leads, found = Group.current().leads, {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if leads:
            found[name] = full.cpu()
    return found
