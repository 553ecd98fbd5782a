"""The addresses of tracking stores: said without their secrets, and the pages of a server."""

from __future__ import annotations

import re

from pmoe_lightning.errors import error_line

#: Stands for what is not said.
HIDDEN = "***"
# A password may hold any character but white space; up to the last @ it belongs to the secret. The path of a SQLite or
# file URI begins with a slash of its own and is never taken for one.
_USER = re.compile(r"(?<=://)(?:[^:/\s]*:\S*|[^/\s?#]*)@")
_QUERY = re.compile(r"\b(?!sqlite|file)([a-z][a-z0-9+.-]*://[^\s?'\"]*\?)[^\s'\"]+", re.IGNORECASE)

_STATUS = re.compile(r"API request .* failed with error code (\d+)|(\d{3}) \w+ Error: ")
_SILENCE = re.compile(r"API request .* failed with (?:timeout )?exception")
_MAX_LENGTH = 500


def without_secrets(text: str) -> str:
    """The text, in which every address is without user, password and (a token may stand there) query.

    SQLite and file addresses have none and stay whole.

        >>> without_secrets("cannot reach http://me:secret@host:5000")
        'cannot reach http://***@host:5000'
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def store_line(error: BaseException) -> str:
    """What an error of a tracking store says in its first line, without secrets.

    What MLflow's client says of a server is an address, a stack in one line or a page of HTML: shortened to what it
    means.
    """
    # SQLAlchemy's own first line may be about itself, before that of the database.
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    line = " ".join((lines or [error_line(error)])[0].split())
    if status := _STATUS.match(line):
        return f"HTTP {status[1] or status[2]}"
    if _SILENCE.match(line):
        return "the server does not answer"
    return without_secrets(line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]}...")


def runs_page(server: str, experiment_id: str) -> str:
    """The page of an experiment's training runs; MLflow would open its page for language models."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
