"""Where a run stands, read from its folder alone: no lock, no model, while another process may be at work."""

import time
from collections.abc import Sequence
from pathlib import Path

from puzzle.runs.files import read_json
from puzzle.runs.run import check_folder, files, identity, last_written, process_in, read_recipe, used_folders
from puzzle.stages import DISTIL, LIBRARY, REALISE, REFINE, REPORT, STAGES, TEACHER, UNIFORM
from puzzle.units import format_bytes, format_seconds

_MAKING = {stage.name for stage in (LIBRARY, REALISE, REFINE, TEACHER, DISTIL)}
"""Stages that the uniform child has as well, opened after the one that finds it."""


def status(path: Path) -> list[str]:
    """Lines for a person: every stage of the recipe, finished or where it stands, what else is kept, what is next."""
    check_folder(path)
    recipe, process = read_recipe(path), process_in(path)
    used = used_folders(path, recipe)
    names = [name for name, _ in used]
    start = names.index(UNIFORM.name) if UNIFORM.name in names else len(names)
    uniform = {name: folder for name, folder in used[start:] if name in _MAKING}
    others = {*path.glob("stages/*")} - {folder for _, folder in used}
    lines = [f"{path}: {format_bytes(_size(path))}, {f'process {process} is at work' if process else 'nobody at work'}"]
    unfinished = list[str]()
    for stage in STAGES:
        if stage is REPORT or not stage.wanted(recipe):
            continue
        folders = [folder for name, folder in used if name == stage.name]
        if own := [folder for folder in folders if folder not in uniform.values()]:
            lines.append(_line(stage.name, own))
        elif stage.result:
            wanted = identity(stage, recipe).items()
            kept = any(wanted <= read_json(folder / "stage.json").items() for folder in others if _done(folder))
            told = "kept from an earlier command, if its inputs are the same" if kept else "-"
            lines.append(f"  {stage.name:<12} {told}")
        if stage is UNIFORM:
            lines += [f"  {_line(name, [folder])}" for name, folder in uniform.items()]
        if not all(map(_done, folders)) or (stage.result and not own):
            unfinished.append(stage.name)
    if others:
        size = format_bytes(sum(map(_size, others)))
        lines.append(f"kept from earlier commands: {len(others)} stage folders, {size}")
    report = path / "report.html"  # the one stage without a folder
    newest = max((last_written(folder) for _, folder in used), default=0.0)
    if not unfinished and report.exists() and report.stat().st_mtime >= newest:
        return [*lines, f"everything is done; see {report}"]
    return [*lines, f"next: {[*unfinished, REPORT.name][0]}; `puzzle run {path / 'recipe.yaml'}` goes on"]


def _done(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _line(name: str, folders: Sequence[Path]) -> str:
    """One line for all folders of a stage."""
    size = format_bytes(sum(map(_size, folders)))
    if open_folders := [folder for folder in folders if not _done(folder)]:
        age = format_seconds(time.time() - max(map(last_written, open_folders)))
        own = [file for folder in open_folders for file, _ in files(folder)]
        count = sum(file.name not in ("stage.json", "clock.json") for file in own)
        return f"  {name:<12} unfinished: {count} file{'' if count == 1 else 's'}, {size}, the last written {age} ago"
    manifests = [read_json(folder / "manifest.json") for folder in folders]
    spent, parts = sum(each["seconds"] for each in manifests), f", {len(folders)} parts" if len(folders) > 1 else ""
    return f"  {name:<12} done in {format_seconds(spent)}{parts}, {size}, {max(m['finished'] for m in manifests)}"


def _size(path: Path) -> int:
    return sum(facts.st_size for _, facts in files(path))
