"""MLflow tracking: the buffered logger, the server check, where a run came from, policies packaged as MLflow models.

The names load on first use, because importing MLflow takes seconds and a command must first be able to refuse.
"""

from pmoe_lightning.lazy import load_on_first_use

_HOMES = {
    "MLflowLogger": "logger",
    "run_status": "logger",
    "check_server": "server",
    "without_secrets": "address",
    "store_line": "address",
    "runs_page": "address",
    "run_name": "naming",
    "describe_run": "naming",
    "sweep_name": "naming",
    "describe_sweep": "naming",
    "provenance": "origin",
    "log_policy_model": "policy_model",
    "queue_policy_model": "policy_model",
    "load_policy": "references",
    "resolve_checkpoint": "references",
    "close_what_was_left": "leftovers",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)
