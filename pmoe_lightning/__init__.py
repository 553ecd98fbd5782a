"""Multimodal continuous-control policies: a Lightning trainer built from TorchRL components.

The names below load on first use, so ``import pmoe_lightning`` costs nothing and never brings in Lightning,
MLflow or Hydra: a plain TorchRL script can take only the actor, the estimator or the loss.
"""

from pathlib import Path

from pmoe_lightning.lazy import load_on_first_use

__version__ = "0.1.0"

# callbacks/ and conf/ lie beside the package in a checkout, because users edit them, and inside it once installed.
_package = Path(__file__).resolve().parent
if not (_package / "conf").is_dir() and (_package.parent / "conf" / "config.yaml").is_file():
    __path__.append(str(_package.parent))

_HOMES = {
    "TanhGaussianMixture": "distributions",
    "make_additive_moe_actor": "actors",
    "make_gaussian_actor": "actors",
    "make_mcp_actor": "actors",
    "make_pmoe_actor": "actors",
    "make_option_actor": "options",
    "make_option_value_network": "critics",
    "make_qvalue_network": "critics",
    "make_value_network": "critics",
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
    "CostConstraint": "safety",
    "SafePolicy": "safety",
    "load_policy": "checkpoints",
    "make_env": "envs",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
