"""Global knowledge distillation."""

from puzzle.distill.gkd import distil, distillation_curve

__all__ = ["distil", "distillation_curve"]
