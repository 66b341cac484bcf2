"""The errors that the command line tells in one line, never as a traceback."""


class UserError(Exception):
    """Bad input, the user's to fix: says what is wrong, where (file, key, value) and what to do. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on though its recipe is right: a worker died, samples are broken, storage is gone. Exit code
    1."""


class RankFailure(Exception):
    """Other ranks died, failed or hang: the message names them, and is empty where another rank prints it. Exit code
    1."""
