"""Names of a folder on this disk or of a repository on the Hugging Face hub: decided before any network.

The disk comes first. A name whose first part is here, or nearly, is a mistyped path and no hub name; what cannot be the
name of a repository is no hub name either. Anything else is asked of the hub once, with a bound on the wait.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from weftlm.errors import ConfigError

SECONDS_TO_WAIT = 5.0
"""For the hub's answer whether it has a repository."""

Repository = Literal["model", "dataset"]

_HUB_NAME = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?(?:/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?)?"
)


def locate(
    name: str | Path, key: str, *, revision: str | None = None, repository: Repository = "model", ask: bool = True
) -> str:
    """Decide what a name refers to.

    Args:
        name: Path, or hub name (`owner/name`, or `name` alone).
        key: Key or option that gave it, for messages: `experts.base`, `--tokenizer`.
        revision: Revision of a hub name.
        repository: Kind of repository.
        ask: Whether to ask the hub; otherwise every name that may be of a repository passes.
    Returns:
        The name itself, with `~` expanded: something is there, in the hub's cache, or on the hub.
    Raises:
        ConfigError: Nothing is there, with what is near; or the hub has no such repository, or cannot be reached.
    """
    text = os.path.expanduser(os.fspath(name))
    if not text or "\0" in text or len(os.fsencode(text)) > 4000:
        raise ConfigError(f"{key} is {text!r:.60}; give a folder or a hub name (owner/name)")
    try:
        if os.path.lexists(text):
            if os.path.exists(text):
                return text
            raise ConfigError(f"{key}: {text} is a link to something that is not there")
    except OSError:
        pass
    looked = "" if text.startswith("/") else f" (looked from {Path.cwd()})"
    if why := _no_hub_name(text):
        raise ConfigError(f"{key}: there is no folder {text:.300}{looked}{near(text)}; {why}")
    if _cached(text, revision, repository):
        return text
    if likely := near(text, here_alone=True):
        raise ConfigError(
            f"{key}: there is no folder {text}{looked}{likely}; the hub was not asked, since a path seems to be meant"
        )
    if ask and (problem := _asked(text, revision, repository)):
        raise ConfigError(f"{key}: {text!r} is no folder here{near(text)}, and {problem}")
    return text


def _no_hub_name(text: str) -> str | None:
    if text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1 or text.endswith("/"):
        return "a hub name would be owner/name"
    if not _HUB_NAME.fullmatch(text) or "--" in text or ".." in text:
        return "it cannot be a hub name either (owner/name, of letters, digits, '-', '_' and '.')"
    return None


def near(text: str | Path, *, here_alone: bool = False) -> str:
    """`; did you mean ...?`, or what the deepest folder of a path that is there holds; empty where nothing is near.

    Args:
        text: the path.
        here_alone: say nothing where only its first part could be meant, and that of a hub name too.
    """
    path = Path(text)
    there = path.parent
    rest = path.name
    try:
        while there != there.parent and not there.is_dir():
            rest, there = there.name, there.parent
        first = len(path.parts) == 1 or not Path(path.parts[0]).exists()
        names = sorted(each.name for each in there.iterdir() if not each.name.startswith("."))
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(rest, names, n=1, cutoff=0.75 if here_alone and first else 0.6)
    if close:
        return f"; did you mean {there / close[0]}?"
    if first and here_alone:
        return ""
    return "" if there in (Path(), Path("/")) or not names else f"; {there} holds {', '.join(names[:6])}"


def _cached(text: str, revision: str | None, repository: Repository) -> bool:
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415  (half a second; most names are folders)

    try:
        snapshot_download(text, revision=revision, repo_type=repository, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return False
    return True


@lru_cache(maxsize=64)
def _asked(text: str, revision: str | None, repository: Repository) -> str | None:
    """What keeps the hub from giving a repository; None where it has it."""
    from huggingface_hub import HfApi, constants, errors  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE is set) and its cache here does not hold it"
    try:
        HfApi().repo_info(text, revision=revision, repo_type=repository, timeout=SECONDS_TO_WAIT)
    except errors.RevisionNotFoundError:
        return f"the hub's repository of that name has no revision {revision!r}"
    except errors.RepositoryNotFoundError:  # or one with a gate
        return (
            f"the hub has no {repository} of that name for you: check the spelling, ask for access on its page, or run "
            "`hf auth login`"
        )
    except Exception as error:  # noqa: BLE001  (whatever its HTTP client raises without a connection)
        return f"the hub cannot be reached ({type(error).__name__}): is this machine offline, or the hub down?"
    return None
