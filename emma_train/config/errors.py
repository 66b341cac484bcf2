"""The one error that is the user's to fix: the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """Bad input: says what is wrong, where (file, key, value) and what to do. Never shown as a traceback."""


class RunFailed(Exception):
    """A run cannot go on for a reason outside of the program, such as its storage: printed as one line, exit code 1."""
