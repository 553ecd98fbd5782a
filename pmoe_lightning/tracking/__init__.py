"""MLflow tracking: the buffered logger, the server check, where a run came from, policies packaged as MLflow models.

The names load on first use, because importing MLflow takes seconds and a command must first be able to refuse.
"""

from typing import TYPE_CHECKING

from pmoe_lightning.lazy import load_on_first_use

if TYPE_CHECKING:
    from pmoe_lightning.tracking.address import runs_page as runs_page
    from pmoe_lightning.tracking.address import store_line as store_line
    from pmoe_lightning.tracking.address import without_secrets as without_secrets
    from pmoe_lightning.tracking.leftovers import close_what_was_left as close_what_was_left
    from pmoe_lightning.tracking.logger import MLflowLogger as MLflowLogger
    from pmoe_lightning.tracking.logger import run_status as run_status
    from pmoe_lightning.tracking.naming import describe_run as describe_run
    from pmoe_lightning.tracking.naming import describe_sweep as describe_sweep
    from pmoe_lightning.tracking.naming import run_name as run_name
    from pmoe_lightning.tracking.naming import sweep_name as sweep_name
    from pmoe_lightning.tracking.origin import provenance as provenance
    from pmoe_lightning.tracking.policy_model import log_policy_model as log_policy_model
    from pmoe_lightning.tracking.policy_model import queue_policy_model as queue_policy_model
    from pmoe_lightning.tracking.references import load_policy as load_policy
    from pmoe_lightning.tracking.references import resolve_checkpoint as resolve_checkpoint
    from pmoe_lightning.tracking.server import check_server as check_server

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
