"""The one error that is written for people."""


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong with which file or value, and
    what to do. The command line prints it and exits with 2; notebooks show it as the last line.
    """
