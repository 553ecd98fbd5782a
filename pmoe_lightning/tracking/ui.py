"""MLflow's page of training runs, in the browser.

    python -m pmoe_lightning.tracking.ui [--port 5001] [other options of `mlflow ui`]

Says the address of the runs' own page, because MLflow opens its page for language models, and becomes `mlflow ui`. With
a server as `MLFLOW_TRACKING_URI` there is nothing to start: it says where that server's page is.
"""

from __future__ import annotations

import argparse
import os
import sys

from pmoe_lightning.errors import RunError
from pmoe_lightning.processes.output import outlive_output


def page(arguments: list[str]) -> tuple[str, str]:
    """The address of the page of training runs and the store it shows.

    Raises:
        RunError: the store cannot be used.
    """
    import mlflow

    from pmoe_lightning.tracking.address import runs_page
    from pmoe_lightning.tracking.server import check_server, prepare_store

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--host", default=os.environ.get("MLFLOW_HOST", "127.0.0.1"))
    parser.add_argument("-p", "--port", default=os.environ.get("MLFLOW_PORT", "5000"))
    chosen, _ = parser.parse_known_args(arguments)
    store = mlflow.get_tracking_uri()
    check_server(store)
    prepare_store(store)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pmoe_lightning"
    experiment = mlflow.MlflowClient(store).get_experiment_by_name(name)
    server = store if store.startswith("http") else f"http://{chosen.host}:{chosen.port}"
    return runs_page(server, experiment.experiment_id if experiment else "0"), store


def main(arguments: list[str]) -> None:
    """Say the address and become ``mlflow ui``."""
    from pmoe_lightning.tracking.address import without_secrets

    try:
        address, store = page(arguments)
    except RunError as error:
        sys.exit(f"error: {error}")
    print(f"open {without_secrets(address)}", flush=True)
    if not store.startswith("http"):
        # Not as an argument, which everybody on the machine can read, with a password in it.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = store
        os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *arguments])


if __name__ == "__main__":
    outlive_output()
    main(sys.argv[1:])
