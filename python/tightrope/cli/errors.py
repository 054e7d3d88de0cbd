"""The one kind of failure that a command explains in a line instead of a traceback."""


class UserError(Exception):
    """What a person can put right: a missing file, a bad value, a package that is not installed."""
