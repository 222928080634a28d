"""Run folders: stages addressed by what they depend on, atomic files, one process at a time, progress."""

from puzzle.runs.files import read_json as read_json
from puzzle.runs.files import read_parsed as read_parsed
from puzzle.runs.files import read_tensors as read_tensors
from puzzle.runs.files import write_atomically as write_atomically
from puzzle.runs.files import write_json as write_json
from puzzle.runs.files import write_tensors as write_tensors
from puzzle.runs.files import write_text as write_text
from puzzle.runs.progress import Progress as Progress
from puzzle.runs.progress import progress as progress
from puzzle.runs.run import Run as Run
from puzzle.runs.run import StageFolder as StageFolder
from puzzle.runs.run import check_folder as check_folder
from puzzle.runs.run import check_new as check_new
from puzzle.runs.run import create_folder as create_folder
from puzzle.runs.run import digest as digest
from puzzle.runs.run import is_run_folder as is_run_folder
from puzzle.runs.run import open_run as open_run
from puzzle.runs.status import status as status
