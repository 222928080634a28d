"""The report: one self-contained HTML page, the model card, and tables for a terminal."""

from typing import TYPE_CHECKING

from puzzle import lazily
from puzzle.report.tables import final_table as final_table
from puzzle.report.tables import solution_table as solution_table
from puzzle.report.tables import solutions_table as solutions_table
from puzzle.report.tables import table_row as table_row

if TYPE_CHECKING:  # isort: off
    from puzzle.report.page import ReportData as ReportData, frontier_page as frontier_page
    from puzzle.report.page import model_card as model_card, render as render

__getattr__ = lazily(__name__, __file__)
