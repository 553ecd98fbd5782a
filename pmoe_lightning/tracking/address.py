"""The addresses of tracking stores: said without their secrets, and the pages of a server."""

from __future__ import annotations

import re

#: Stands for what is not said.
HIDDEN = "***"
# A password may hold any character but white space; up to the last @ it belongs to the secret. The path of a SQLite or
# file URI begins with a slash of its own and is never taken for one.
_USER = re.compile(r"(?<=://)(?:[^:/\s]*:\S*|[^/\s?#]*)@")
_QUERY = re.compile(r"\b(?!sqlite|file)([a-z][a-z0-9+.-]*://[^\s?'\"]*\?)[^\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text, in which every address is without user, password and (a token may stand there) query.

    SQLite and file addresses have none and stay whole.

        >>> without_secrets("cannot reach http://me:secret@host:5000")
        'cannot reach http://***@host:5000'
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def first_line(error: BaseException) -> str:
    """What an error says in its first line, without secrets; the name of its class if it says nothing."""
    return without_secrets((str(error).splitlines() or [type(error).__name__])[0])


def runs_page(server: str, experiment_id: str) -> str:
    """The page of an experiment's training runs; MLflow would open its page for language models."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
