"""The one exception that a user's own mistake raises: a sentence that says what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad input. The command line prints the sentence and leaves with exit code 2, earlier outputs untouched."""

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with its control characters written out: a file's name or contents must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\xa0" else c.encode("unicode_escape").decode() for c in text)
