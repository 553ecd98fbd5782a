"""What a finished run leaves behind: its checkpoints, a film of its best policy, and that policy as a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from pmoe_lightning.checkpoints.files import read_checkpoint
from pmoe_lightning.checkpoints.policy import policy_entry
from pmoe_lightning.envs import MAKERS
from pmoe_lightning.evaluation.film import record_video
from pmoe_lightning.exporting.formats import Format, check_installed
from pmoe_lightning.exporting.policy_file import export_policy
from pmoe_lightning.limits import Flag, PositiveInt, Seed, Text, checked
from pmoe_lightning.modules.acting import ASKS_ACTING
from pmoe_lightning.modules.mixture import offers
from pmoe_lightning.processes.stopping import stop
from pmoe_lightning.tracking.references import load_policy

from .evaluation import Evaluation
from .mixture import modes_along_an_episode, recent_mixture
from .reporting import find_callback, log_artifact, log_blocks, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer


class FinalPolicy(Checkpoint):
    """When training ends, log the run's checkpoints, film its best policy and package it as an MLflow model or a file.

    Checkpoints go to the artifact folder ``checkpoints``, the film to ``videos`` and beside the best checkpoint; the
    model is called ``policy``. The best policy is that of the run's monitoring ``ModelCheckpoint``, else the last one
    saved. Without a logger only the film and the file are made, without a checkpoint nothing. What fails here, for
    example rendering on a machine that cannot, is a one-line warning: the training itself is done and kept.

    The model has a card, ``README.md``: what the policy is, its returns, what they do not say, how it is loaded.

    A policy with memory, which needs more than an observation, is not packaged: that too is a one-line warning.

    After an error or an interrupt only the checkpoints are logged, because whoever stops a run does not want to wait.

    Lightning calls ``Checkpoint`` callbacks last and in the given order: put this one behind every
    ``ModelCheckpoint``.

    Args:
        video: film a whole episode.
        video_seed: seed of that episode.
        video_frames: pictures of the film, about; a longer episode is drawn at every n-th step.
        model: package the policy; needs the ``MLflowLogger``.
        register_as: also make the model the next version of this registered MLflow model, whose alias ``best`` moves to
            it where it was evaluated better, see ``tracking.best_alias``.
        export: also write the policy beside its checkpoint, as a file of this format that acts without this package
            (``exporting``), and log it to the artifact folder ``exported``.

    Raises:
        RunError: the packages of the format are not installed.
    """

    @checked
    def __init__(
        self,
        *,
        video: Flag = True,
        video_seed: Seed = 0,
        video_frames: PositiveInt = 250,
        model: Flag = True,
        register_as: Text | None = None,
        export: Format | None = None,
    ) -> None:
        if export is not None:
            check_installed(export)
        self.export = export
        self.video, self.video_seed, self.video_frames = video, video_seed, video_frames
        self.model, self.register_as = model, register_as

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        best = self._log_checkpoints(trainer)
        if best is None or not trainer.is_global_zero:
            return
        if self.video:
            with warn_on_failure("no video of the best policy"), stop.interruptible(ends_children=True):
                self._film(trainer, pl_module, best)
        if self.model:
            # Not interruptible: an exception in the middle of an export can end in an abort of the process.
            with warn_on_failure("the best policy was not packaged"):
                self._package(trainer, pl_module, best)
        if self.export is not None:
            with warn_on_failure("the best policy was not exported"):
                self._export(trainer, pl_module, best, self.export)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        with warn_on_failure("the checkpoints were not logged"):
            self._log_checkpoints(trainer)

    def _log_checkpoints(self, trainer: Trainer) -> Path | None:
        """Queue the upload of every checkpoint the run kept; return the best one."""
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        savers.sort(key=lambda saver: saver.monitor is None)
        saved = [Path(saver.best_model_path) for saver in savers if saver.best_model_path]
        # What was saved because of an exception does not become a best_model_path.
        saved += [Path(saver.format_checkpoint_name({})) for saver in savers if saver.save_on_exception]
        kept = [path for path in dict.fromkeys(saved) if path.is_file()]
        for path in kept:
            if path.name == "last.ckpt":  # what a run goes on from, elsewhere too; a policy needs no replay buffer
                log_blocks(trainer, path, "checkpoints")
            log_artifact(trainer, path, "checkpoints")
        return kept[0] if kept else None

    def _film(self, trainer: Trainer, pl_module: AbstractAlgorithm, checkpoint: Path) -> None:
        env = pl_module.policy_description["env"]
        video = record_video(
            load_policy(checkpoint, parts=pl_module.parts),
            env["id"],
            checkpoint.with_suffix(".mp4"),
            seed=self.video_seed,
            max_frames=self.video_frames,
            env_kwargs=env["kwargs"],
            make=_env_maker(pl_module),
        )
        log_artifact(trainer, video, "videos")

    def _export(self, trainer: Trainer, pl_module: AbstractAlgorithm, checkpoint: Path, format: Format) -> None:
        env = pl_module.policy_description["env"]
        written = export_policy(
            policy_entry(read_checkpoint(checkpoint)),
            checkpoint.with_suffix(f".{format}"),
            format=format,
            parts=pl_module.parts,
            make_env=partial(_env_maker(pl_module), id=env["id"], **env["kwargs"]),
            overwrite=True,
        )
        log_artifact(trainer, written.path, "exported")

    def _package(self, trainer: Trainer, pl_module: AbstractAlgorithm, checkpoint: Path) -> None:
        for logger in trainer.loggers:
            from pmoe_lightning.tracking import MLflowLogger, queue_policy_model

            if isinstance(logger, MLflowLogger):
                queue_policy_model(
                    logger,
                    checkpoint,
                    checkpoint.with_suffix(".model"),
                    parts=pl_module.parts,
                    register_as=self.register_as,
                    training=describe_training(trainer, pl_module, checkpoint),
                    picture=_picture(trainer, pl_module, checkpoint),
                )


def _env_maker(pl_module: AbstractAlgorithm) -> Callable[..., Any]:
    """What makes the run's environment, whoever's it is."""
    maker = MAKERS[pl_module.policy_description["env"].get("backend", "gymnasium")]
    return next((part for name, part in pl_module.parts.items() if name.startswith("env/")), maker)


def describe_training(trainer: Trainer, pl_module: AbstractAlgorithm, checkpoint: Path) -> dict[str, Any]:
    """What the run knows of the policy in a checkpoint and its file does not say: plain values for the model card."""
    from pmoe_lightning.tracking.origin import provenance

    frames = read_checkpoint(checkpoint)["policy"]["env_frames"]
    description, began = pl_module.policy_description, pl_module.init_from
    transform, estimator = description.get("action_transform"), pl_module.estimator
    told = {
        "algorithm": type(pl_module).__name__,
        "estimator": type(estimator).__name__ if estimator is not None else None,
        "action_transform": transform.get("force") if transform else None,
        "seed": trainer.datamodule.seed,
        "begun": f"with the weights of {_named(began['reference'])}" if began else None,
        "origin": provenance(),
    }
    evaluation = find_callback(trainer, Evaluation)
    if evaluation is not None and frames in evaluation.returns:
        told |= {"returns": evaluation.returns[frames], "first_seed": evaluation.seed}
        told["evaluations"] = sum(at > 0 for at in evaluation.returns)
        told["environment"] = description.get("env")
    return told


def _named(reference: str) -> str:
    """Of a place on this machine the name alone: the card goes where the model goes."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def _picture(trainer: Trainer, pl_module: AbstractAlgorithm, checkpoint: Path) -> bytes | None:
    """The modes of the packaged mixture as a PNG; None for one Gaussian, or where nothing judges the policy."""
    evaluation = find_callback(trainer, Evaluation)
    mixture = None if pl_module.last_observation is None else recent_mixture(pl_module, 1)
    if evaluation is None or mixture is None or getattr(mixture, "num_components", 1) < 2:
        return None
    picture = BytesIO()
    with warn_on_failure("the model card has no picture of the mixture"):
        if offers(mixture, ASKS_ACTING):
            policy = load_policy(checkpoint, parts=pl_module.parts)
            modes_along_an_episode(policy, evaluation).savefig(picture, format="png", dpi=60)
    return picture.getvalue() or None
