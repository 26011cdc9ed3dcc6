"""Analysis of finished runs: pure functions over the results frame. Neither Ray nor Streamlit.

from haltscale.platform.analysis import fit_power_law
from haltscale.platform.sweeps.report import results

frame = results(RunStore(), "my-study")
law = fit_power_law(frame[frame["method"] == "adaptive"], "flops_realised")
"""

from haltscale.platform.analysis.compare import Multiplier, equivalent
from haltscale.platform.analysis.estimates import Estimate, Refusal
from haltscale.platform.analysis.frontier import IsoFlop, disagreement, isoflop, optimal_exponent, pareto
from haltscale.platform.analysis.laws import (
    HeldOut,
    LawFit,
    RecurrenceFit,
    fit_power_law,
    fit_recurrence,
    fit_surface,
    leave_one_budget_out,
)
from haltscale.platform.analysis.matched import (
    Basis,
    Comparison,
    Verdict,
    choose_setting,
    compare_arms,
    document_frame,
    matched_points,
    mean_difference,
    provisional_points,
    verdict,
)
from haltscale.platform.analysis.recipes import recipe_warning
from haltscale.platform.analysis.runs import Selection, usable
from haltscale.platform.analysis.sweeps import SeedNoise, importance, seed_noise, slices
from haltscale.platform.analysis.targets import Outcome, Target, judge, targets_of

__all__ = [
    "Basis",
    "Comparison",
    "Estimate",
    "HeldOut",
    "IsoFlop",
    "LawFit",
    "Multiplier",
    "Outcome",
    "RecurrenceFit",
    "Refusal",
    "SeedNoise",
    "Selection",
    "Target",
    "Verdict",
    "choose_setting",
    "compare_arms",
    "disagreement",
    "document_frame",
    "equivalent",
    "fit_power_law",
    "fit_recurrence",
    "fit_surface",
    "importance",
    "isoflop",
    "judge",
    "leave_one_budget_out",
    "matched_points",
    "mean_difference",
    "optimal_exponent",
    "pareto",
    "provisional_points",
    "recipe_warning",
    "seed_noise",
    "slices",
    "targets_of",
    "usable",
    "verdict",
]
