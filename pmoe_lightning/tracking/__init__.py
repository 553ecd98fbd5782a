"""MLflow tracking: the buffered logger, the server check, where a run came from, policies packaged as MLflow models.

The names load on first use, because importing MLflow takes seconds and a command must first be able to refuse.
"""

from importlib import import_module

_HOMES = {
    "MLflowLogger": "logger",
    "run_status": "logger",
    "check_server": "server",
    "provenance": "origin",
    "log_policy_model": "policy_model",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
