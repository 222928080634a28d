"""The user's cache folder: what is made once on a machine and serves every run on it."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`puzzle` below `XDG_CACHE_HOME`, or below `.cache` at home; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puzzle"
