"""Group risks, objectives built from them, and timestep densities, in plain torch."""

from invdiff_pl.objectives.densities import Density, build_density, min_snr_weights
from invdiff_pl.objectives.risk import Objective, group_objective, group_risks, group_sums
from invdiff_pl.objectives.rules import Rule, build_rule

__all__ = [
    "Density",
    "Objective",
    "Rule",
    "build_density",
    "build_rule",
    "group_objective",
    "group_risks",
    "group_sums",
    "min_snr_weights",
]
