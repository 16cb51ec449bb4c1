"""What people look at: tables of results."""

from qface.reporting.tables import agreement_table, demo_table, evaluation_table, latency_table

__all__ = ["agreement_table", "demo_table", "evaluation_table", "latency_table"]
