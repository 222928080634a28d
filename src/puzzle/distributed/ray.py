"""Tasks, and the processes of GKD, on a Ray cluster. The work of a lost process or machine is started again.

Every machine has this program installed, and sees the run folder, the parent and the text under the same paths.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import TCPStore, destroy_process_group  # type: ignore[attr-defined]

from puzzle.distributed.group import TIMEOUT, is_lost_peer, join
from puzzle.distributed.tasks import TOGETHER
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import Run, progress

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise PuzzleError("--on: ray is not installed; pip install 'puzzle-llm[ray]', on every machine") from None

_RETRIES = 10
"""Restarts of a task or a training after its process or machine was lost."""


class Cluster:
    """The cluster that `run.on` names: `ray` is the one of this machine, or this machine alone if it is in none;
    `ray://HOST:6379` is the one with that head, to which this machine belongs too.

    The command is a process of the cluster and no Ray Client, which gives up 30 s after losing its connection.

    A worker is one GPU; where the cluster has none or `execution.device` is `cpu`, it is as many CPUs as this process
    has threads, so that sums are in the same order as here.
    """

    def __init__(self, run: Run) -> None:
        _connect(str(run.on))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device, gpus = run.recipe.execution.device, int(sum(node.get("GPU", 0) for node in nodes))
        if device not in ("auto", "cpu", "cuda"):
            raise PuzzleError(f"execution.device: found {device!r}; for a cluster, leave it at auto, cpu or cuda")
        if device == "cuda" and not gpus:
            raise PuzzleError("execution.device: found 'cuda', and no machine of the cluster has a GPU")
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        self.on_gpus = gpus > 0 and device != "cpu"
        room = sum(cpus) // gpus if self.on_gpus else max(cpus, default=0)
        self.threads = max(1, min(torch.get_num_threads(), room))
        self.workers = gpus if self.on_gpus else sum(count // self.threads for count in cpus)
        if not self.workers:
            raise PuzzleError(f"--on: the cluster {run.on} offers neither GPUs nor CPUs; start a worker machine")

    def run(
        self, label: str, function: Callable[..., object], items: Sequence[tuple[Any, ...]], retries: int = _RETRIES
    ) -> None:
        """Call `function` on every item. An error in one ends all; items of lost processes are started again.

        Raises:
            LostProcessError: an item's processes were lost more often than `retries`.
        """
        resources = {"num_gpus": 1, "num_cpus": 1} if self.on_gpus else {"num_cpus": self.threads}
        # A process does one item, so that the next one finds the GPU's memory free.
        work = ray.remote(max_retries=retries, max_calls=1, **resources)(_work)
        shared, lost = ray.put(function), None
        waiting = [work.remote(Path.cwd(), self.threads, shared, item) for item in items]
        try:
            with progress(f"{label} on {min(self.workers, len(items))} workers", len(items)) as bar:
                while waiting:
                    done, waiting = ray.wait(waiting)
                    try:
                        ray.get(done)
                    except RayTaskError as error:
                        cause = cast(Exception, error.cause)
                        if not is_lost_peer(cause):
                            if not isinstance(cause, PuzzleError):
                                cause.add_note(str(error))  # the traceback over there
                            raise cause from None
                        lost = cause  # the peer may still tell why it ended
                    bar.advance(len(done))
        except RayError as error:
            lost = error
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
        if lost is not None:
            raise LostProcessError(
                f"--on: a process of {label} was lost ({one_line(lost)}); look at the machines (memory?), then run the "
                "same command again: it goes on where it stood"
            )


class LostProcessError(PuzzleError):
    """A process, or its machine, is gone."""


def train_on_cluster(run: Run, train: Callable[[Run], object], sequences: int) -> None:
    """Call `train` with the run on as many workers of the cluster `run.on` as divide `sequences`, all at once; again if
    one is lost, on those left. It can be pickled, and resumes from its own state; this process holds the lock.
    """
    for attempt in range(_RETRIES + 1):
        cluster = Cluster(run)
        size = max(count for count in range(1, cluster.workers + 1) if sequences % count == 0)
        run.log(f"GKD on {size} of {cluster.workers} workers")
        store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        work = partial(_train, run, train, store.host, store.port, size)
        try:
            cluster.run("GKD", work, [(rank,) for rank in range(size)], retries=0)
            return
        except LostProcessError as lost:
            if attempt == _RETRIES:
                raise
            run.log_warning(f"{lost.args[0].partition(';')[0]}; training goes on from its last saved state")


def _train(run: Run, train: Callable[[Run], object], host: str, port: int, size: int, rank: int) -> None:
    """Runs in each of the processes that train together."""
    group = join(run.device, TCPStore(host, port, timeout=TIMEOUT), rank, size)
    train(replace(run, on=None, leads=group.leads, only=TOGETHER))
    group.wait()
    destroy_process_group()


def _work(folder: Path, threads: int, function: Callable[..., object], item: tuple[Any, ...]) -> None:
    """Runs in a worker, in the folder of the command, since paths in recipes may be relative."""
    if not folder.is_dir():
        raise PuzzleError(f"--on: {os.uname().nodename} has no folder {folder}; machines must share a file system")
    os.chdir(folder)
    torch.set_num_threads(threads)
    function(*item)


def _connect(on: str) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = on.removeprefix("ray").removeprefix("://")
    try:
        if address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or None)
    except (RayError, OSError, ImportError, ValueError, RuntimeError) as error:
        raise PuzzleError(
            f"--on: found {on!r}, and this machine cannot join such a cluster ({one_line(error)}); see `ray status`, "
            "and whether RAY_AUTH_MODE is that of the cluster"
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would exit without our cleanup
