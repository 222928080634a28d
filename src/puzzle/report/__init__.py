"""The report: one self-contained HTML page, the model card, and tables for a terminal."""

from puzzle.report.data import Check, ReportData, versions
from puzzle.report.figures import frontier_figure
from puzzle.report.page import model_card, render, write_report
from puzzle.report.table import final_table, solution_table, solutions_table, summary, table_row

__all__ = ["Check", "ReportData", "final_table", "frontier_figure", "model_card", "render", "solution_table"]
__all__ += ["solutions_table", "summary", "table_row", "versions", "write_report"]
