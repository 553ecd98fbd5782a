"""Search with Optuna: every trial is a run of the train command, below one parent run in MLflow.

    pip install "pmoe-lightning[optuna]"
    python examples/sweep_optuna.py --trials 20 algo=sac env=Pendulum-v1 total_frames=10000

What is searched stands in ``suggest``; all other words go to the train command as they are. A trial that fails is left
out and the search goes on.
"""

import argparse
import os
import subprocess
import sys

import mlflow
import optuna

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--trials", type=int, default=20)
parser.add_argument("--seed", type=int, default=0, help="of the search; that of the runs is the word seed=...")
arguments, words = parser.parse_known_args()


def suggest(trial: optuna.Trial) -> dict[str, object]:
    return {
        "algo.lr": trial.suggest_float("algo.lr", 1e-4, 3e-3, log=True),
        "actor.num_components": trial.suggest_int("actor.num_components", 1, 8),
    }


def objective(trial: optuna.Trial) -> float:
    """The return of the last evaluation."""
    overrides = [f"{key}={value}" for key, value in suggest(trial).items()]
    with mlflow.start_run(run_name=" ".join(overrides), nested=True) as run:
        # The command adopts the run that this variable names, as it does under `mlflow run`.
        environ = os.environ | {"MLFLOW_RUN_ID": run.info.run_id}
        subprocess.run([sys.executable, "-m", "pmoe_lightning.train", *words, *overrides], env=environ, check=True)
    return mlflow.get_run(run.info.run_id).data.metrics["eval/episode_return"]


mlflow.set_experiment("optuna")
with mlflow.start_run(run_name="search"):
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=arguments.seed))
    study.optimize(objective, n_trials=arguments.trials, catch=subprocess.CalledProcessError)
    mlflow.log_params(study.best_params)
    mlflow.log_metric("best_return", study.best_value)
print(f"best of {len(study.trials)} trials: return {study.best_value:.1f} with {study.best_params}")
