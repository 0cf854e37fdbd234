"""Group risks and penalties, in plain torch."""

from invdiff_pl.objectives.risk import Objective, group_sums, invariant_objective

__all__ = ["Objective", "group_sums", "invariant_objective"]
