"""Keeping freed memory while measuring on the CPU.

A forward frees and asks for tensors of many megabytes. By default glibc gives such memory back to the kernel at once,
and the next tensor pays for every page again: a third of the prefill at small sizes, and a different share each time,
depending on the heap's history (docs/numbers.md). Servers preload an allocator that keeps memory (tcmalloc, jemalloc);
here glibc is told to.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from malloc.h
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
# Once set, the thresholds no longer move by themselves; these are where glibc's own end up with large tensors.
_GIVE_BACK = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 64 * 2**20, _M_MMAP_THRESHOLD: 32 * 2**20}
KEPT_FROM_START = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""Environment variables that say the same to a process that is to be started."""
KEPT = "glibc, freed memory kept"
"""What an engine's `environment` calls it."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what it frees until the end of the block; no effect without glibc."""
    if not _is_glibc():
        yield
        return
    _set(_KEEP)
    try:
        yield
    finally:
        _set(_GIVE_BACK)
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def keeps_memory(device: torch.device) -> bool:
    """Whether there is anything to say: of a GPU's memory an allocator of torch's own keeps what is freed."""
    return device.type == "cpu" and _is_glibc()


def _is_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
