"""Where a run stands, read from its folder alone: no lock, no model, while another process may be at work."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle.runs.files import read_json
from puzzle.runs.run import check_folder, process_in
from puzzle.runs.stage import files, last_written
from puzzle.units import format_bytes, format_seconds


@dataclass(frozen=True)
class _Folder:
    name: str
    path: Path
    command_ns: int
    """When the last command that used it began."""

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def done(self) -> bool:
        return self.manifest.exists()


def status(path: Path, stages: Sequence[str]) -> list[str]:
    """Lines for a person: every stage, finished or where it stands, what else is kept, and what is next.

    Args:
        stages: the names of all stages that have folders, in their order.
    """
    check_folder(path)
    folders = _folders(path)
    newest = {folder.name: folder.command_ns for folder in folders}
    current = [folder for folder in folders if folder.command_ns == newest[folder.name]]
    process = process_in(path)
    lines = [f"{path}: {format_bytes(_size(path))}, {f'process {process} is at work' if process else 'nobody at work'}"]
    for name in [*stages, *(name for name in newest if name not in stages)]:
        lines += [_line(folder) for folder in current if folder.name == name] or [f"  {name:<12} -"]
    if (variants := path / "variants").exists():
        lines.append(f"  variants     {format_bytes(_size(variants))}, trained once for all libraries")
    if others := [folder for folder in folders if folder not in current]:
        size = format_bytes(sum(_size(folder.path) for folder in others))
        lines.append(f"kept from earlier commands: {len(others)} stage folders, {size}")
    if folders and process is None and (path / "recipe.yaml").stat().st_mtime_ns > folders[-1].command_ns:
        lines.append("recipe.yaml is newer than that; what depends on an edit in it will run again")
    return [*lines, _next(path, stages, current)]


def _folders(path: Path) -> list[_Folder]:
    """Every stage folder, the last used last."""
    found = [
        _Folder(file.parent.name.rpartition("-")[0], file.parent, file.stat().st_mtime_ns)
        for file in path.glob("stages/*/stage.json")
    ]
    return sorted(found, key=lambda folder: (folder.command_ns, folder.path))


def _line(folder: _Folder) -> str:
    size = format_bytes(_size(folder.path))
    if folder.done:
        manifest = read_json(folder.manifest)
        return f"  {folder.name:<12} done in {format_seconds(manifest['seconds'])}, {size}, {manifest['finished']}"
    age = format_seconds(time.time() - last_written(folder.path))
    count = _count(folder.path)
    plural = "" if count == 1 else "s"
    return f"  {folder.name:<12} unfinished: {count} file{plural}, {size}, the last written {age} ago"


def _next(path: Path, stages: Sequence[str], current: list[_Folder]) -> str:
    begun, unfinished = {folder.name for folder in current}, {folder.name for folder in current if not folder.done}
    report = path / "report.html"  # the one stage without a folder
    for name in stages:
        if name not in begun or name in unfinished:
            break
    else:
        newest = max(folder.manifest.stat().st_mtime for folder in current)
        if report.exists() and report.stat().st_mtime >= newest:
            return f"everything is done; see {report}"
        name = "report"
    return f"next: {name}; `puzzle run {path / 'recipe.yaml'}` goes on"


def _count(path: Path) -> int:
    """Files a stage wrote, without those that describe it."""
    return sum(file.name not in ("stage.json", "clock.json") for file, _ in files(path))


def _size(path: Path) -> int:
    return sum(facts.st_size for _, facts in files(path))
