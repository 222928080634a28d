"""The processes of one training, started by torchrun or Ray: rank, size, collectives, and how they exit.

A single process is a group of size 1, without a process group of torch, and nothing here waits.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from puzzle.device import claim_gpu, collective_backend
from puzzle.errors import PuzzleError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Of a collective: the others wait while rank 0 writes a whole model. torchrun notices lost processes by itself."""


@dataclass(frozen=True)
class Group:
    """Rank and size of this process's group."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> "Group":
        """The group that this process has joined, or this process alone."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)

    @property
    def leads(self) -> bool:
        """Whether it has rank 0, which alone writes, logs and locks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU; bit for bit equal in all of them."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def first(self, function: Callable[[], T]) -> T:
        """The result of `function` in rank 0, for all; a `PuzzleError` there is raised in all."""
        if self.size == 1:
            return function()
        found: list[Any] = [None]
        if self.leads:
            try:
                found = [function()]
            except PuzzleError as error:
                found = [error]
        dist.broadcast_object_list(found)
        if isinstance(found[0], PuzzleError):
            raise found[0]
        return cast(T, found[0])

    def wait(self) -> None:
        """A barrier."""
        self.sum(torch.zeros(()))


def start(device: torch.device) -> Group:
    """Join what torchrun started; on GPUs, each process uses the GPU of its local rank."""
    claim_gpu(device, int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    return join(device, _fresh(store, rank, size), rank, size)


def join(device: torch.device, store: Store, rank: int, size: int) -> Group:
    """Make this process one of a group, of which rank 0 alone prints from here on."""
    dist.init_process_group(collective_backend(device), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return Group(rank, size)


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A prefix of the store that holds no keys of an earlier attempt.

    After a restart, torchrun hands out the same store with the addresses of the dead processes: 10 of 12 restarts of
    three processes failed (torch 2.13, 2026-11-21). So rank 0 chooses a new prefix and collects a token from every
    other rank; a rank uses a prefix once its own token is listed there, so that it cannot join an earlier attempt.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("first", token)
        others = [store.get(f"{token}/{other}").decode() for other in range(1, size)]
        store.set(f"{token}/all", " ".join(others))
        return PrefixStore(token, store)
    while True:
        first = store.get("first").decode()
        store.set(f"{first}/{rank}", token)
        if store.check([f"{first}/all"]) and token in store.get(f"{first}/all").decode().split():
            return PrefixStore(first, store)
        time.sleep(0.05)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo/" in str(error))


def end(code: int) -> NoReturn:
    """Exit one of several processes at once, without the interpreter's shutdown.

    That races with gloo's threads and sometimes aborts (SIGABRT) after all work is done.
    """
    if code == 0 and dist.is_initialized():
        Group.current().wait()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
