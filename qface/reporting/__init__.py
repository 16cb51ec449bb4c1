"""Tables, figures and pages that show results."""

from qface.reporting.figures import sensitivity_figure
from qface.reporting.tables import (
    agreement_table,
    alignment_table,
    costs_table,
    demo_table,
    evaluation_table,
    groups_tables,
    identification_table,
    latency_table,
    plan_table,
    sensitivity_tables,
    stress_table,
    templates_tables,
    thresholds_table,
)

__all__ = [
    "agreement_table",
    "alignment_table",
    "costs_table",
    "demo_table",
    "evaluation_table",
    "groups_tables",
    "identification_table",
    "latency_table",
    "plan_table",
    "sensitivity_figure",
    "sensitivity_tables",
    "stress_table",
    "templates_tables",
    "thresholds_table",
]
