"""The one exception that a user's own mistake raises: a sentence that says what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad input. The command line prints the sentence and leaves with exit code 2, earlier outputs untouched."""

    exit_code = 2
