"""The report: one self-contained HTML page; its result table for the terminal, for programs and for the model card."""

from puzzle.report.card import model_card, versions
from puzzle.report.choice import frontier_figure
from puzzle.report.data import ReportData
from puzzle.report.page import render, write_report
from puzzle.report.solutions import solution_table, solutions_table
from puzzle.report.table import final_table, summary

__all__ = [
    "ReportData",
    "final_table",
    "frontier_figure",
    "model_card",
    "render",
    "solution_table",
    "solutions_table",
    "summary",
    "versions",
    "write_report",
]
