"""The one exception for what a person can cause and mend."""


class PuzzleError(ValueError):
    """One clear line: the setting, what was found, and what to do. The command line prints it and exits with 2."""
