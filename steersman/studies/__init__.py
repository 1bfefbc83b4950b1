"""Studies: one experiment a system, which checks its paper's main claim on the user's own machine."""

from steersman.studies.study import BUDGETS, Claim, Report, Study, run_study

__all__ = ["BUDGETS", "Claim", "Report", "Study", "run_study"]
