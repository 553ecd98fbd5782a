"""Multimodal continuous-control policies: a Lightning trainer built from TorchRL components.

The names below load on first use, so ``import pmoe_lightning`` costs nothing and never brings in Lightning,
MLflow or Hydra: a plain TorchRL script can take only the actor, the estimator or the loss.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from pmoe_lightning.lazy import load_on_first_use

__version__ = "0.1.0"

# callbacks/ and conf/ lie beside the package in a checkout, because users edit them, and inside it once installed.
_package = Path(__file__).resolve().parent
if not (_package / "conf").is_dir() and (_package.parent / "conf" / "config.yaml").is_file():
    __path__.append(str(_package.parent))

_HOMES = {
    "TanhGaussianMixture": "modules.distributions",
    "make_additive_moe_actor": "modules.actors",
    "make_gaussian_actor": "modules.actors",
    "make_mcp_actor": "modules.actors",
    "make_pmoe_actor": "modules.actors",
    "make_option_actor": "modules.option_policies",
    "make_option_value_network": "modules.critics",
    "make_qvalue_network": "modules.critics",
    "make_layer_norm_network": "modules.critics",
    "make_crossq_network": "modules.crossq",
    "make_value_network": "modules.critics",
    "Frequency": "estimators",
    "GumbelSoftmax": "estimators",
    "HalfReparameterized": "estimators",
    "Implicit": "estimators",
    "Marginalized": "estimators",
    "Pathwise": "estimators",
    "ScoreFunction": "estimators",
    "EvolveAction": "hamiltonian",
    "HamiltonianTransform": "hamiltonian",
    "differentiable": "hamiltonian",
    "make_hamiltonian_transform": "hamiltonian",
    "DACLoss": "losses",
    "PMOESACLoss": "losses",
    "PMOEPPOLoss": "losses",
    "SafeSACLoss": "losses",
    "CostConstraint": "safe",
    "SafePolicy": "safe",
    "load_policy": "tracking",
    "make_env": "envs",
}
__all__ = sorted(_HOMES)
_public = load_on_first_use(__name__, _HOMES)
#: Where the modules are now that a user's configuration of before may name in a `_target_`.
_FORMER = {"actors": "modules.actors", "options": "modules.option_policies", "safety": "safe"}


def __getattr__(name: str) -> Any:
    return import_module(f"{__name__}.{_FORMER[name]}") if name in _FORMER else _public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
