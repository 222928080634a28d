"""An engine in another environment, as a process that answers requests: one line of JSON each way."""

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from puzzle.errors import PuzzleError, one_line


class Worker:
    """The process: requests on its standard input, answers on a pipe of their own, for engines print what they like."""

    def __init__(
        self, engine: str, python: Path, script: Path, threads: int, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            engine: as `scenario.engine` names it, for error messages.
            script: gets the pipe's descriptor as its argument; imports nothing of puzzle.
            threads: of OpenMP, set before any library looks.
            variables: further ones for its environment.
        """
        self._engine = engine
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            [str(python), str(script), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=(writer,),
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(variables or {}),
        )
        os.close(writer)
        self._answers = os.fdopen(reader, encoding="utf-8")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; a `PuzzleError` if it is an error, or if the process dies of the request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise PuzzleError(f"scenario.engine: {self._engine}'s process ended with {code}; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PuzzleError(f"scenario.engine: {self._engine} cannot run this ({one_line(answer['error'])})")
        return answer

    def close(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()
