"""The errors weftlm raises for causes a user can mend.

A message says what came, what is allowed and what to do. `assert` is for weftlm's own bugs. Only the command line turns
these into exit codes.
"""


class WeftError(Exception):
    """Base of every error whose cause lies outside weftlm."""


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


def install_hint(extra: str) -> str:
    """The command that installs an optional dependency group of weftlm, for an error message.

    weftlm is not on a package index, so the command installs from a checkout: a bare name could bring somebody else's
    code.
    """
    return f"run `pip install '.[{extra}]'` in your checkout of weftlm"
