"""Run folders: stages addressed by what they depend on, atomic files, one process at a time, progress."""

# isort: off
from puzzle.runs.files import digest as digest, file_digest as file_digest, lost as lost, read_json as read_json
from puzzle.runs.files import read_parsed as read_parsed, read_tensors as read_tensors, remembered as remembered
from puzzle.runs.files import write_atomically as write_atomically, write_json as write_json
from puzzle.runs.files import write_tensors as write_tensors, write_text as write_text
from puzzle.runs.progress import Progress as Progress, progress as progress
from puzzle.runs.run import Run as Run, StageFolder as StageFolder, check_folder as check_folder, check_new as check_new
from puzzle.runs.run import create_folder as create_folder, is_run_folder as is_run_folder, open_run as open_run
from puzzle.runs.run import read_recipe as read_recipe, used_folders as used_folders
from puzzle.runs.status import status as status
