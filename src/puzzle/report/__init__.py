"""The report: one self-contained HTML page, the model card, and tables for a terminal."""

from puzzle.report.figures import frontier_figure
from puzzle.report.page import ReportData, final_table, model_card, render, solution_table, solutions_table
from puzzle.report.page import table_row as table_row

__all__ = ["ReportData", "final_table", "frontier_figure", "model_card", "render", "solution_table", "solutions_table"]
