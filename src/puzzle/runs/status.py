"""Where a run stands, read from its folder alone: no lock, no model, while another process may be at work."""

import time
from pathlib import Path

from puzzle.recipe import Recipe
from puzzle.runs.files import read_json
from puzzle.runs.run import check_folder, files, last_written, process_in
from puzzle.stages import COMMANDS, REPORT
from puzzle.units import format_bytes, format_seconds


def status(path: Path) -> list[str]:
    """Lines for a person: every stage of the recipe, finished or where it stands, what else is kept, what is next."""
    check_folder(path)
    recipe = Recipe.read(path / "recipe.yaml")
    process, used_file = process_in(path), path / "used.json"
    used = [path / "stages" / name for name in (read_json(used_file) if used_file.exists() else [])]
    lines = [f"{path}: {format_bytes(_size(path))}, {f'process {process} is at work' if process else 'nobody at work'}"]
    names = [stage.name for stage in COMMANDS if stage.wanted(recipe) and stage is not REPORT]
    by_name: dict[str, list[Path]] = {name: [] for name in names}
    for folder in used:
        by_name.setdefault(folder.name.rpartition("-")[0], []).append(folder)
    for name, folders in by_name.items():
        lines += [_line(name, folder) for folder in folders] or [f"  {name:<12} -"]
    if others := [folder for folder in path.glob("stages/*") if folder not in used]:
        size = format_bytes(sum(map(_size, others)))
        lines.append(f"kept from earlier commands: {len(others)} stage folders, {size}")
    if used and process is None and (path / "recipe.yaml").stat().st_mtime > used_file.stat().st_mtime:
        lines.append("recipe.yaml is newer than that; what depends on an edit in it will run again")
    open_stage = next((name for name in names if not all(map(_done, by_name[name])) or not by_name[name]), None)
    report = path / "report.html"  # the one stage without a folder
    newest = max((last_written(folder) for folder in used), default=0.0)
    if open_stage is None and report.exists() and report.stat().st_mtime >= newest:
        return [*lines, f"everything is done; see {report}"]
    return [*lines, f"next: {open_stage or REPORT.name}; `puzzle run {path / 'recipe.yaml'}` goes on"]


def _done(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _line(name: str, folder: Path) -> str:
    size = format_bytes(_size(folder))
    if _done(folder):
        manifest = read_json(folder / "manifest.json")
        return f"  {name:<12} done in {format_seconds(manifest['seconds'])}, {size}, {manifest['finished']}"
    age = format_seconds(time.time() - last_written(folder))
    count = sum(file.name not in ("stage.json", "clock.json") for file, _ in files(folder))
    return f"  {name:<12} unfinished: {count} file{'' if count == 1 else 's'}, {size}, the last written {age} ago"


def _size(path: Path) -> int:
    return sum(facts.st_size for _, facts in files(path))
