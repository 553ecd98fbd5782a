"""Multimodal continuous-control policies: a Lightning trainer built from TorchRL components.

The names below load on first use, so ``import pmoe_lightning`` costs nothing and never brings in Lightning,
MLflow or Hydra: a plain TorchRL script can take only the actor, the estimator or the loss.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmoe_lightning.lazy import load_on_first_use

if TYPE_CHECKING:
    from pmoe_lightning.envs import make_env as make_env
    from pmoe_lightning.estimators import Frequency as Frequency
    from pmoe_lightning.estimators import GumbelSoftmax as GumbelSoftmax
    from pmoe_lightning.estimators import HalfReparameterized as HalfReparameterized
    from pmoe_lightning.estimators import Implicit as Implicit
    from pmoe_lightning.estimators import Marginalized as Marginalized
    from pmoe_lightning.estimators import Pathwise as Pathwise
    from pmoe_lightning.estimators import ScoreFunction as ScoreFunction
    from pmoe_lightning.hamiltonian import EvolveAction as EvolveAction
    from pmoe_lightning.hamiltonian import HamiltonianTransform as HamiltonianTransform
    from pmoe_lightning.hamiltonian import differentiable as differentiable
    from pmoe_lightning.hamiltonian import make_hamiltonian_transform as make_hamiltonian_transform
    from pmoe_lightning.losses import DACLoss as DACLoss
    from pmoe_lightning.losses import PMOEPPOLoss as PMOEPPOLoss
    from pmoe_lightning.losses import PMOESACLoss as PMOESACLoss
    from pmoe_lightning.losses import SafeSACLoss as SafeSACLoss
    from pmoe_lightning.modules.actors import make_additive_moe_actor as make_additive_moe_actor
    from pmoe_lightning.modules.actors import make_gaussian_actor as make_gaussian_actor
    from pmoe_lightning.modules.actors import make_mcp_actor as make_mcp_actor
    from pmoe_lightning.modules.actors import make_pmoe_actor as make_pmoe_actor
    from pmoe_lightning.modules.critics import make_layer_norm_network as make_layer_norm_network
    from pmoe_lightning.modules.critics import make_option_value_network as make_option_value_network
    from pmoe_lightning.modules.critics import make_qvalue_network as make_qvalue_network
    from pmoe_lightning.modules.critics import make_value_network as make_value_network
    from pmoe_lightning.modules.crossq import make_crossq_network as make_crossq_network
    from pmoe_lightning.modules.distributions import TanhGaussianMixture as TanhGaussianMixture
    from pmoe_lightning.modules.encoders import make_drq_encoder as make_drq_encoder
    from pmoe_lightning.modules.option_policies import make_option_actor as make_option_actor
    from pmoe_lightning.safe import CostConstraint as CostConstraint
    from pmoe_lightning.safe import SafePolicy as SafePolicy
    from pmoe_lightning.tracking import load_policy as load_policy

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
    "make_drq_encoder": "modules.encoders",
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
