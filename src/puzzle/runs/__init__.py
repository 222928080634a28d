"""Run folders: stages addressed by what they depend on, atomic files, one process at a time, progress."""

from puzzle.runs.files import read_tensors, write_json, write_tensors, write_text
from puzzle.runs.progress import Progress, progress
from puzzle.runs.run import Run, Stage, create_folder, digest, is_run_folder, open_run

__all__ = [
    "Progress",
    "Run",
    "Stage",
    "create_folder",
    "digest",
    "is_run_folder",
    "open_run",
    "progress",
    "read_tensors",
    "write_json",
    "write_tensors",
    "write_text",
]
