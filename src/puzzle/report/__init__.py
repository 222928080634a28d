"""The report: one self-contained HTML page, the model card, and tables for a terminal."""

from puzzle.report.figures import frontier_figure
from puzzle.report.page import model_card, render
from puzzle.report.table import ReportData, final_table, solution_table, solutions_table, summary, table_row

__all__ = ["ReportData", "final_table", "frontier_figure", "model_card", "render", "solution_table", "solutions_table"]
__all__ += ["summary", "table_row"]
