"""Tasks on a Ray cluster. Ray places them, and begins those again that a lost process or machine had.

Every machine has this program installed, and sees the run folder, the parent and the text under the same paths.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from puzzle.errors import PuzzleError, one_line
from puzzle.runs import Run, progress

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise PuzzleError("--on: ray is not installed; pip install 'puzzle-llm[ray]', on every machine") from None

_RETRIES = 10
"""Times that a task is begun again after its process or machine was lost."""


class Cluster:
    """The cluster that `run.on` names: `ray` is the one this machine is part of, or else this machine alone;
    `ray://HOST:6379` is the one with that head, which this machine is part of too.

    The command is a process of the cluster, no Ray Client: that gives a run up 30 s after its connection is lost.

    A worker is one GPU; where the cluster has none or `execution.device` is `cpu`, as many CPUs as this process has
    threads, so that sums are taken in the same order as here.
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
        on_gpus = gpus > 0 and device != "cpu"
        room = sum(cpus) // gpus if on_gpus else max(cpus, default=0)
        self._threads = max(1, min(torch.get_num_threads(), room))
        self.workers = gpus if on_gpus else sum(count // self._threads for count in cpus)
        self._resources = {"num_gpus": 1, "num_cpus": 1} if on_gpus else {"num_cpus": self._threads}
        if not self.workers:
            raise PuzzleError(f"--on: the cluster {run.on} offers neither GPUs nor CPUs; start a worker machine")

    def run(self, label: str, function: Callable[..., object], items: Sequence[tuple[Any, ...]]) -> None:
        """Call `function` on every item. An error in one of them ends all; lost processes and machines do not."""
        # Ray ends a process after a task on a GPU, so that the next one finds the memory free.
        work = ray.remote(max_retries=_RETRIES, **self._resources)(_work)
        shared = ray.put(function)
        waiting = [work.remote(Path.cwd(), self._threads, shared, item) for item in items]
        try:
            with progress(f"{label} on {min(self.workers, len(items))} workers", len(items)) as bar:
                while waiting:
                    done, waiting = ray.wait(waiting)
                    ray.get(done)
                    bar.advance(len(done))
        except RayTaskError as error:
            cause = cast(Exception, error.cause)
            if not isinstance(cause, PuzzleError):
                cause.add_note(str(error))  # the traceback over there
            raise cause from None
        except RayError as error:
            raise PuzzleError(
                f"--on: a task of {label} was lost {_RETRIES + 1} times ({one_line(error)}); look at the machines "
                "(memory?), then run the same command again: it goes on where it stood"
            ) from None
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def _work(folder: Path, threads: int, function: Callable[..., object], item: tuple[Any, ...]) -> None:
    """In a worker's process: from the folder in which the command was given, for paths in recipes may be relative."""
    if not folder.is_dir():
        raise PuzzleError(f"--on: {os.uname().nodename} has no folder {folder}; machines must share a file system")
    os.chdir(folder)
    torch.set_num_threads(threads)
    function(*item)


def _connect(on: str) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = on.removeprefix("ray").removeprefix("://")
    try:
        if address:  # Ray itself asks a head that is not there for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or None)
    except (RayError, OSError, ImportError, ValueError, RuntimeError) as error:
        raise PuzzleError(
            f"--on: found {on!r}, and this machine cannot join such a cluster ({one_line(error)}); see `ray status`, "
            "and whether RAY_AUTH_MODE is that of the cluster"
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would leave without the tidying of ours
