"""Export: one file per format."""

from puzzle.export.hf import export_hf

__all__ = ["export_hf"]
