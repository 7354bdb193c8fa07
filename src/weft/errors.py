"""The errors weft raises for causes a user can mend.

A message says what came, what is allowed and what to do. `assert` is for weft's own bugs. Only the command line turns
these into exit codes.
"""


class WeftError(Exception):
    """Base of every error whose cause lies outside weft."""


class ConfigError(WeftError, ValueError):
    """A recipe, an argument or an option is wrong."""


class DataError(WeftError):
    """Text, token shards or prepared data are missing, broken, changed or leaking between sets."""


class CheckpointError(WeftError):
    """A checkpoint cannot be written, or is torn, corrupt or of another run."""


class NumericsError(WeftError):
    """A number that must be finite or normalised is not."""


class ExpertError(WeftError):
    """An expert, its adapter or its gate cannot be used."""
