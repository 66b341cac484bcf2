"""The one error that is the user's to fix: the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """Bad input: says what is wrong, where (file, key, value) and what to do. Never shown as a traceback."""
