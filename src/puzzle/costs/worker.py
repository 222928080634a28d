"""An engine in another Python environment: a process that answers requests, one line of JSON each way."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Sample
from puzzle.engines.environments import ENVIRONMENTS, python_of, version_of
from puzzle.errors import PuzzleError, one_line

_SERVE = Path(__file__).parent / "workers" / "serve.py"


class Worker:
    """The process of one engine: `workers/serve.py` with the engine's own file beside it."""

    def __init__(self, engine: str, script: str, scenario: Scenario) -> None:
        """Nothing is started yet.

        Args:
            engine: as `scenario.engine` names it.
            script: file in `workers/`.
        """
        self._engine, self._script, self._scenario = engine, script, scenario
        self._process: subprocess.Popen[str] | None = None

    def version(self, module: str) -> str:
        """Of the engine's package."""
        return version_of(python_of(*ENVIRONMENTS[self._engine]), module)

    @contextmanager
    def running(self, variables: Mapping[str, str]) -> Iterator[None]:
        """Keep the process until the end of the block.

        Args:
            variables: for its environment, beside the number of OpenMP's threads.
        """
        reader, writer = os.pipe()  # engines print what they like to standard output
        process = subprocess.Popen(
            [str(python_of(*ENVIRONMENTS[self._engine])), str(_SERVE), self._script, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=(writer,),
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | dict(variables),
        )
        os.close(writer)
        assert process.stdin is not None
        with os.fdopen(reader, encoding="utf-8") as self._answers:
            self._process = process
            try:
                yield
            finally:
                self._process = None
                with suppress(BrokenPipeError):
                    process.stdin.close()
                process.wait()

    def time(self, model: Path, batch_sizes: Sequence[int], rounds: int, **options: Any) -> list[list[Sample]]:
        """For each batch size a sample a round; a `PuzzleError` if the engine refuses, or dies of the request.

        Args:
            options: what the engine's own script needs to know.
        """
        assert self._process is not None, "measure inside `conditions`"
        assert self._process.stdin is not None
        request = {
            "model": str(model),
            "threads": torch.get_num_threads(),
            "prompt_tokens": self._scenario.prompt_tokens,
            "generated_tokens": self._scenario.generated_tokens,
            "batch_sizes": list(batch_sizes),
            "rounds": rounds,
            **options,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise PuzzleError(f"scenario.engine: {self._engine}'s process ended with {code}; run it by hand to see why")
        answer = json.loads(line)
        if "error" in answer:
            raise PuzzleError(f"scenario.engine: {self._engine} cannot run this ({one_line(answer['error'])})")
        return [
            [Sample(prefill_ms=prefill_ms, decode_ms=decode_ms) for prefill_ms, decode_ms in samples]
            for samples in answer["samples"]
        ]
