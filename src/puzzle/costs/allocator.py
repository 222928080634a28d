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

from puzzle.device import is_gpu

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # from malloc.h
KEPT_FROM_START = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""Environment variables that say the same to a process that is to be started."""


def keeps_memory(device: torch.device) -> bool:
    """Whether glibc must be told: on a GPU, torch's own allocator keeps what is freed."""
    return not is_gpu(device) and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def allocator_name(device: torch.device) -> str:
    """What an engine's `environment` calls it."""
    return "glibc, freed memory kept" if keeps_memory(device) else "as it comes"


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Let the process keep what it frees on this device until the end of the block."""
    if not keeps_memory(device):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        # Once set, the thresholds no longer move by themselves; these are where glibc's own end up with large tensors.
        for option, value in ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 64 * 2**20), (_MMAP_THRESHOLD, 32 * 2**20)):
            libc.mallopt(option, value)
        libc.malloc_trim(ctypes.c_size_t(0))
