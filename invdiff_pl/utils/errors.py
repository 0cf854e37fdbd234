"""The one exception type whose message is meant for the user."""


class InvDiffError(ValueError):
    """Bad input or a bad setting, told in one clear sentence.

    The message names the file, row, key or argument, what was expected, what was found and how to
    mend it. The command line prints it without a traceback and exits with a non-zero status.
    """
