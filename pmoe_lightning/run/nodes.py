"""A node of the configuration and the call that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

#: What names a part's class or what only other parts read, as opposed to its arguments.
_NOT_ARGUMENTS = ("_target_", "_partial_", "suggests", "normalize_observation", "normalize_reward")


def bound(node: DictConfig) -> Callable[..., Any]:
    """The node's target with the node's values bound."""
    return instantiate({"_target_": node._target_, **arguments_of(node)}, _partial_=True)


def call(node: DictConfig, **objects: Any) -> Any:
    """Call the node's target with its values and with objects, which never pass through the configuration."""
    return bound(node)(**objects)


def arguments_of(node: DictConfig) -> dict[str, Any]:
    """The node's values as plain Python objects, without those that are not arguments of its target."""
    values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    return {key: value for key, value in values.items() if key not in _NOT_ARGUMENTS}


def accelerator_of(name: str) -> str:
    # Lightning's own "auto" would choose the GPU of a Mac, which lacks float64.
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
