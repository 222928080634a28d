"""Keeping freed memory while measuring on the CPU.

A forward frees and asks for tensors of many megabytes. By default glibc gives such memory back to the kernel at once,
and the next tensor pays for every page again: a third of the prefill at small sizes, and a different share each time,
depending on the heap's history (docs/numbers.md). Servers preload an allocator that keeps memory (tcmalloc, jemalloc);
here glibc is told to.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
_NEVER_TRIM, _TRIM_BYTES = -1, 64 * 2**20  # what glibc's own moving threshold comes to at most
_NO_MMAP, _MMAP_MAX = 0, 65536  # glibc's default


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what it frees until the end of the block; no effect without glibc."""
    if not is_glibc():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, _NO_MMAP)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        libc.malloc_trim(ctypes.c_size_t(0))


def is_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
