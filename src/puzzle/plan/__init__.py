"""What follows from a recipe before anything is computed, here or on many devices."""

from puzzle.plan.checks import check_installed, check_recipe
from puzzle.plan.devices import StagePlan, plan_devices
from puzzle.plan.here import estimate

__all__ = ["StagePlan", "check_installed", "check_recipe", "estimate", "plan_devices"]
