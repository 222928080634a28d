"""Everything that depends on the device that computes: nobody else asks what kind of device it is.

float32 stays float32, since laws compare bits; bfloat16, `precision` in the recipe, is the fast way. Only elementwise
functions are compiled, and only on a GPU. The attention kernel is SDPA's choice, made in `modeling`.
"""

import functools
import gc
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from puzzle.errors import PuzzleError, one_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager


def choose_device(wanted: str) -> torch.device:
    """That of `execution.device`, where `auto` is the GPU if there is one; a `PuzzleError` if torch cannot use it."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
        if is_gpu(device) and device.index is not None:
            torch.cuda.set_device(device)  # else events and graphs would be of the first GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = f"{wanted!r}, which torch cannot use here ({one_line(error)})"
        raise PuzzleError(f"execution.device: found {found}") from None
    return device


def is_gpu(device: torch.device) -> bool:
    """Whether work is queued and done later, in memory of its own; for what is not covered by a function below."""
    return device.type != "cpu"


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the processor."""
    if is_gpu(device):
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.*\S)", cpu_info.read_text("utf-8"), re.M) if cpu_info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Matrix products in bfloat16 if that is the precision; else, also inside another `autocast`, as factors are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with this tensor is computed: autocast's, or its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, as one kernel where its first tensor is on a GPU with a compiler; not if TORCHDYNAMO_DISABLE=1."""

    @functools.cache
    def fused() -> Callable[..., torch.Tensor]:
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return torch.compile(function) if compiler and find_spec("triton") else function

    @functools.wraps(function)
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return (fused() if is_gpu(tensors[0].device) else function)(*tensors)

    return call


def float32_operand(weight_VD: torch.Tensor) -> torch.Tensor:
    """A matrix as `float32_product` multiplies it; kept in bfloat16 only on a GPU, which sums in float32 anyway."""
    return weight_VD if is_gpu(weight_VD.device) else weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))


def float32_product(rows_ND: torch.Tensor, operand_VD: torch.Tensor) -> torch.Tensor:
    """Rows @ operand.T, [N, V], in float32 at least: logits rounded to bfloat16 have steps of 0.125 at 16 to 32."""
    rows_ND = rows_ND.to(operand_VD.dtype)
    if operand_VD.dtype == torch.bfloat16:
        return torch.mm(rows_ND, operand_VD.T, out_dtype=torch.float32)
    return rows_ND @ operand_VD.T


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products on a GPU in TF32 if allowed: some 7 times as fast, with 10 of 23 bits: bfloat16 has 7."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if allowed else before
    try:
        yield
    finally:
        products.fp32_precision = before


def rows_at_once(device: torch.device) -> int:
    """Rows that one product sums: TF32 units cut off what does not fit after each 8, by reckoning 6e-6 of 2048."""
    return 2048 if is_gpu(device) else sys.maxsize


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What `precision: auto` is: bfloat16 where there are instructions for it (what they bring: docs/numbers.md)."""
    if is_gpu(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def mesh_type(device: torch.device) -> str:
    """How processes that train together name it."""
    return device.type


def collective_backend(device: torch.device) -> str:
    """What carries tensors from process to process."""
    return "cpu:gloo,cuda:nccl" if is_gpu(device) else "gloo"


def claim_gpu(device: torch.device, number: int) -> None:
    """Let this process, one of several of the machine, use the GPU of its number; nothing to do on a CPU.

    A `PuzzleError` if there is none for it, or the recipe names one for all of them.
    """
    if not is_gpu(device):
        return
    if device.index is not None:
        raise PuzzleError(f"execution.device: found {str(device)!r}; for several processes, give cuda or auto")
    if number >= (count := torch.cuda.device_count()):
        raise PuzzleError(f"torchrun: process {number + 1} of this machine has no GPU of its own, there are {count}")
    torch.cuda.set_device(number)


def memory_bytes(device: torch.device, allowed: int | None = None) -> int:
    """For weights and training states: `execution.memory`; else 80 % of a GPU's free memory, or half of the computer's.

    A GPU is ours alone: what is left over holds a batch's activations (5 GB for 16k tokens in an FFN of 14336 channels)
    and fragments. A computer runs other programs and caches files.
    """
    if allowed is not None:
        return allowed
    if not is_gpu(device):
        try:  # what Linux would give without swapping, file caches included
            lines = Path("/proc/meminfo").read_text().splitlines()
            available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):  # on other systems all there is
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(0.5 * available)
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (torch.cuda.mem_get_info(device)[0] + kept_by_torch))


def disk_bytes(folder: Path, allowed: int | None = None) -> int:
    """`execution.disk`, or half of what is free where `folder` is."""
    return shutil.disk_usage(folder).free // 2 if allowed is None else allowed


def release_memory() -> None:
    """Give the driver back what torch keeps for later, before another process uses the GPU (vLLM, llama.cpp)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stager(device: torch.device) -> "DefaultStager | None":
    """Copies what is on a GPU into pinned memory, from which a thread can write while work goes on; none for a CPU."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # half a second

    options = StagingOptions(use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False)
    return DefaultStager(options) if is_gpu(device) else None


def free_share(device: torch.device) -> float:
    """Part of a GPU's memory that no process has taken; 1 on a CPU."""
    free, total = torch.cuda.mem_get_info(device) if is_gpu(device) else (1, 1)
    return free / total


def times_ms(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    """How long each of several calls takes, in milliseconds: on a GPU between events, waiting once at the end.

    With one CPU thread it is the processor's time of this process, which leaves out what other programs take.
    """
    if not is_gpu(device):
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        marks = [clock()]
        for _ in range(repeats):
            work()
            marks.append(clock())
        return [1e3 * (end - begin) for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def replays_ms(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    """How long a GPU takes for each of several replays of one call, captured as a CUDA graph: no launches are counted.

    The call changes no shape, and asks the device nothing.
    """
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):  # libraries make their workspaces, and choose their kernels
        for _ in range(3):
            work()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return times_ms(device, graph.replay, repeats)


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of one large matrix product."""
    size = 4096 if is_gpu(device) else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    _, *times = times_ms(device, lambda: matrix @ matrix, 4)
    return 2.0 * size**3 / (1e-3 * statistics.fmean(times))


def tokens_at_once(device: torch.device, hidden_size: int) -> int:
    """Tokens to compute together where their number is free: on a CPU what stays in its cache. On a GPU 64M values, on
    which the shortest operation takes longer than a launch; 16k tokens of a hidden size of 4096.
    """
    return max(1, 2**26 // hidden_size) if is_gpu(device) else 512


def layers_at_once(hidden_BTD: torch.Tensor) -> int:
    """Layers whose students are computed together, by what enters one; on a CPU, where nothing is launched, one."""
    return max(1, 2**26 // hidden_BTD.numel()) if is_gpu(hidden_BTD.device) else 1


def task_batch_size(device: torch.device) -> int | str:
    """Questions of a task in a batch: on a GPU lm-eval tries what fits; on a CPU, where more brings nothing, 16."""
    return "auto" if is_gpu(device) else 16


def logits_at_once(device: torch.device) -> int:
    """Logits in a chunk of tokens: on a GPU 1 GiB of float32, 2048 tokens at 128k; on a CPU what stays in its cache."""
    return 2**28 if is_gpu(device) else 2**20


def steps_between_looks(step_seconds: float) -> int:
    """Training steps, for 10 seconds and at most 16, until the next look at losses and at whether to save or stop.

    Each makes the device run out of work.
    """
    return max(1, min(16, int(10.0 / max(step_seconds, 1e-9))))
