"""Models of which every process holds a share of each tensor (FSDP2); a process alone holds them whole."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from puzzle.distributed.group import Group


def shard(module: nn.Module, device: torch.device, products: torch.dtype | None = None) -> None:
    """Leave each process its share of the module's parameters, but for those that were sharded before.

    The module's `forward` gathers them and lets them go; gradients come out as the mean over all processes. Inner
    modules first; the outermost is the one to call. Call it on modules still without memory, and `fill` them.

    Args:
        products: the dtype in which parameters are gathered, if not their own; gradients are summed in float32.
    """
    size = Group.current().size
    if size == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=_mesh(device.type, size), mp_policy=policy)


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


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The module's own parameters whole until the end of the block, for code that reads them past its `forward`."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    yield
    module.reshard()


def release(module: nn.Module) -> None:
    """Let go of what the outermost module's `forward` gathered and, without a backward pass, would keep.

    Whether a parameter trains is read when it is gathered the next time.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a share, in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one at a time; the others get none of them."""
    leads, found = Group.current().leads, {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if leads:
            found[name] = full.cpu()
    return found
