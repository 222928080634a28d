"""Run folders: stages addressed by what they depend on, atomic files, one process at a time, progress."""

from puzzle.runs.files import (
    digest,
    file_digest,
    lost,
    read_json,
    read_parsed,
    read_tensors,
    remembered,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)
from puzzle.runs.progress import Progress, progress
from puzzle.runs.run import (
    Run,
    StageFolder,
    check_folder,
    check_new,
    create_folder,
    is_run_folder,
    open_run,
    read_recipe,
    used_folders,
)
from puzzle.runs.status import status

__all__ = ["Progress", "Run", "StageFolder", "check_folder", "check_new", "create_folder", "digest", "file_digest"]
__all__ += [
    "is_run_folder",
    "lost",
    "open_run",
    "progress",
    "read_json",
    "read_parsed",
    "read_tensors",
    "remembered",
    "status",
]
__all__ += ["read_recipe", "used_folders", "write_atomically", "write_json", "write_tensors", "write_text"]
