"""The main loop of an engine's process; run by the interpreter of the engine's environment: imports nothing of puzzle.

    python serve.py SCRIPT DESCRIPTOR

Reads one request a line from standard input, lets `measure(request)` of SCRIPT answer it, and writes one line to the
descriptor: {"samples": [[[prefill_ms, decode_ms], ...one a round], ...one list a batch size]} or {"error": "..."}.
Requests: see `ProcessEngine`. Standard output belongs to the engine, which prints what it likes.
"""

import json
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as answers:
        measure = runpy.run_path(str(Path(__file__).with_name(sys.argv[1])))["measure"]
        for line in sys.stdin:
            try:
                answer = {"samples": measure(json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
