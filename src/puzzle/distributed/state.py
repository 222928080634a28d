"""What several processes hold their shares of: models (FSDP2), and the state of a training on disk.

Any other number of processes can go on from such a state; a process alone holds everything whole.

FOLDER/training000320/*.safetensors    parameters, moments and step counters after step 320, from each process a file
                      tensors.json     their names; written last: the state is whole

Written by `torch.distributed.checkpoint` as safetensors, so that nothing is ever unpickled.
"""

import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from puzzle.device import mesh_type, stager
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import read_json, write_json

CHECKPOINT_INTERVAL_S = 30.0
"""Work lost at most when a training is killed, unless saving takes long."""
_NAMES = "tensors.json"

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is one


def shard(whole: nn.Module, parts: Iterable[nn.Module], device: torch.device, products: torch.dtype) -> None:
    """Leave each process its share of the parameters of a module still without memory, which is then filled.

    The `forward` of each part gathers its own, in the dtype of products, and lets them go, that of `whole` those in no
    part; gradients are summed in float32, and come out as the mean over all processes.
    """
    if (size := Group.current().size) == 1:
        return
    mesh = init_device_mesh(mesh_type(device), (size,))
    for module in (*parts, whole):
        if any(True for _ in module.parameters()):
            gathered = None if module is whole else products
            policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy)


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model without memory its parameters, one at a time: of each, this process keeps its share."""
    wanted = dict(model.named_parameters())
    state = {}
    for name, tensor in tensors:
        value, place = tensor.to(device, dtype), wanted.get(name)
        if isinstance(place, DTensor):
            # Every process has read the file: nothing needs to be sent.
            value = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
        state[name] = value
    model.load_state_dict(state, strict=False, assign=True)


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one at a time; the others get none of them."""
    leads, found = Group.current().leads, {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if leads:
            found[name] = full.cpu()
    return found


class SaveTimer:
    """When to save `num_bytes`: every `CHECKPOINT_INTERVAL_S`, or so rarely that it costs a twentieth of the time."""

    def __init__(self, num_bytes: int) -> None:
        self._save_seconds, self._last = num_bytes / 5e8, time.monotonic()  # before one is measured

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(CHECKPOINT_INTERVAL_S, 20 * self._save_seconds)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around each save."""
        began, self._last = time.monotonic(), math.inf
        yield
        self._last = time.monotonic()
        self._save_seconds = self._last - began


class TrainingState(AbstractContextManager["TrainingState"]):
    """Parameters, optimizer moments and the number of steps done; leaving its context waits for what is being written.

    On a GPU a training waits for copies in pinned memory, which a thread writes. On a CPU that would gain nothing.

    Args:
        parameters: all that is saved, whether an optimizer has it or not; shares of tensors, or whole ones that are the
            same in all processes.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        self._folder, self._parameters, self._optimizers = folder, parameters, optimizers
        self._group = Group.current()
        self.timer = SaveTimer(3 * sum(value.nbytes for value in parameters.values()))  # with two moments
        self._stager = stager(next(iter(parameters.values())).device)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        # Collectives of the thread must not meet those of the training.
        self._processes = dist.new_group(backend="gloo") if self._group.size > 1 else None

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        if kind is None:  # after an error the others may be in another collective
            self.wait()
        if self._processes is not None:
            dist.destroy_process_group(self._processes)

    def restore(self) -> int:
        """Load the newest saved state, if it has all of these parameters; returns the number of steps done, or 0.

        It may have others, which are left alone: of students that were trained together some may be finished.

        Raises:
            PuzzleError: it is damaged.
        """
        path, names = self._group.first(partial(_newest, self._folder))
        if path is None or not {f"parameter.{name}" for name in self._parameters} <= names:
            return 0
        moved = {name.partition(".")[2] for name in names if not name.startswith("parameter.")}
        for name, parameter in self._parameters.items():
            if name in moved:
                parameter.grad = torch.zeros_like(parameter)
        for optimizer in self._optimizers:
            optimizer.step()  # makes moments and counters, where it wants them; what they hold is loaded
            optimizer.zero_grad()
        try:
            reader = HuggingFaceStorageReader(str(path))
            reader.read_metadata()  # of a damaged file, `load` itself would log a traceback
            load(self._tensors(), storage_reader=reader)
        except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
            found = f"{path} is damaged ({one_line(error)})"
            raise PuzzleError(f"{found}; delete it, and run the same command again") from None
        return int(path.name.removeprefix("training"))

    def save(self, steps: int) -> None:
        """Write it; all processes call this together, and one state that is whole is on disk at any time."""
        self.wait()
        path, tensors = self._folder / f"training{steps:06d}", self._tensors()
        self._group.first(partial(shutil.rmtree, path, ignore_errors=True))  # of an attempt that was killed
        staged = self._stager.stage(tensors) if self._stager else tensors
        self._writing = self._writer.submit(self._write, path, staged)
        if self._stager is None:
            self.wait()

    def wait(self) -> None:
        """Until what `save` began is on disk, in all processes."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._group.first(writing.result)

    def _write(self, path: Path, tensors: Any) -> None:
        with self.timer.saving():
            writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
            save(tensors, storage_writer=writer, process_group=self._processes)
            if self._group.leads:
                write_json(path / _NAMES, list(tensors))
                remove_states(self._folder, keep=path)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"parameter.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        names = {parameter: name for name, parameter in self._parameters.items()}
        for parameter, state in (item for optimizer in self._optimizers for item in optimizer.state.items()):
            found |= {f"{kind}.{names[parameter]}": value for kind, value in state.items()}
        return found


def saved_names(folder: Path) -> set[str]:
    """Names of the parameters in the newest state that is saved in `folder`; none if there is no state."""
    names = _newest(folder)[1]
    return {name.removeprefix("parameter.") for name in names if name.startswith("parameter.")}


def remove_states(folder: Path, keep: Path | None = None) -> None:
    """Delete what only a training that goes on would need."""
    for path in folder.glob("training*/"):
        if path != keep:
            shutil.rmtree(path)


def _newest(folder: Path) -> tuple[Path | None, set[str]]:
    """The newest state that is whole, and the names of its tensors."""
    file = max(folder.glob(f"training*/{_NAMES}"), default=None)
    return (None, set()) if file is None else (file.parent, set(read_json(file)))
