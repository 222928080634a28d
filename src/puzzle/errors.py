"""The one exception for what a person can cause and mend, and what other libraries say, on one line."""


class PuzzleError(ValueError):
    """One clear line: the setting, what was found, and what to do. The command line prints it and exits with 2."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
