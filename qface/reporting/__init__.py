"""What people look at: tables of results."""

from qface.reporting.tables import demo_table, evaluation_table

__all__ = ["demo_table", "evaluation_table"]
