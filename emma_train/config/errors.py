"""Errors that the command line prints as one line: the one that is the user's to fix, and the loss of other ranks."""


class UserError(Exception):
    """Bad input: says what is wrong, where (file, key, value) and what to do. Never shown as a traceback."""


class LostRanks(Exception):
    """Other ranks died, failed or hang: the message names them, and is empty where another rank prints it. Exit code
    1."""
