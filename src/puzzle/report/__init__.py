"""The report: one self-contained HTML page; its result table for the terminal, for programs and for the model card."""

from puzzle.report.card import model_card, versions
from puzzle.report.data import ReportData
from puzzle.report.page import render, write_report
from puzzle.report.table import final_table, summary

__all__ = ["ReportData", "final_table", "model_card", "render", "summary", "versions", "write_report"]
