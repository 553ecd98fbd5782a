"""The Hamiltonian transform: actions drawn from a policy, then evolved towards higher action value.

The idea, a policy whose draws are refined by Hamiltonian dynamics, is that of Xu & Fekri (2021, arXiv 2103.12020). Only
the abstract of that paper was at hand: every equation here is this project's own definition, none is quoted from it.
"""

from pmoe_lightning.hamiltonian.forces import AbstractForce, Gated, Normalized, Raw
from pmoe_lightning.hamiltonian.transform import (
    ActionValue,
    Evolution,
    EvolveAction,
    HamiltonianTransform,
    differentiable,
    make_hamiltonian_transform,
)

__all__ = [
    "AbstractForce",
    "ActionValue",
    "EvolveAction",
    "Evolution",
    "Gated",
    "HamiltonianTransform",
    "Normalized",
    "Raw",
    "differentiable",
    "make_hamiltonian_transform",
]
