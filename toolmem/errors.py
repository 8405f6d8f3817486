"""Errors that speak to the user."""


class ToolmemError(ValueError):
    """Something the user can mend: what was wrong, where (file, line, key), and what to do.

    The command line prints its text as one plain message and exits with code 2, without a traceback.
    """
