"""An engine in another Python environment: a process that answers requests, one line of JSON each way."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Sample
from puzzle.engines.environments import ENVIRONMENTS, python_of
from puzzle.errors import PuzzleError, one_line

_SERVE = Path(__file__).parent / "workers" / "serve.py"


@dataclass
class Worker:
    """The process of the scenario's engine: `workers/serve.py`, with the engine's `script` beside it."""

    script: str
    scenario: Scenario
    _process: "subprocess.Popen[str] | None" = field(default=None, init=False)
    _answers: TextIO = field(init=False)

    @contextmanager
    def running(self, variables: Mapping[str, str]) -> Iterator[None]:
        """Keep the process until the end of the block, with these variables in its environment."""
        reader, writer = os.pipe()  # engines print what they like to standard output
        process = subprocess.Popen(
            [str(python_of(*ENVIRONMENTS[self.scenario.engine])), str(_SERVE), self.script, str(writer)],
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
                with suppress(BrokenPipeError):
                    process.stdin.close()
                process.wait()

    def measure(self, model: Path, batch_sizes: Sequence[int], rounds: int, **options: Any) -> list[list[Sample]]:
        """For each batch size a sample a round; a `PuzzleError` if the engine refuses, or dies of the request.

        Args:
            options: what the script needs to know besides.
        """
        engine, process = self.scenario.engine, self._process
        assert process is not None, "measure inside `conditions`"
        assert process.stdin is not None
        request = {
            "model": str(model),
            "batch_sizes": list(batch_sizes),
            "rounds": rounds,
            "prompt_tokens": self.scenario.prompt_tokens,
            "generated_tokens": self.scenario.generated_tokens,
            "threads": torch.get_num_threads(),
            **options,
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise PuzzleError(
                f"scenario.engine: {engine}'s process ended with {process.wait()}; run it by hand to see why"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise PuzzleError(f"scenario.engine: {engine} cannot run this ({one_line(answer['error'])})")
        return [[Sample(prefill_ms=pair[0], decode_ms=pair[1]) for pair in pairs] for pairs in answer["samples"]]
