"""What a signature states holds for every call, and costs its function nothing else."""

from __future__ import annotations

import inspect
import pickle
from typing import Annotated, Any, Literal

import pytest

from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.limits import (
    Flag,
    Limit,
    Of,
    PositiveFloat,
    PositiveInt,
    Text,
    UnitInterval,
    checked,
    stated_parameters,
    take,
)
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor


class Base:
    @checked
    def __init__(self, sizes: list[PositiveInt] = (2,), *, rate: PositiveFloat = 0.5, seed: int = 0) -> None:
        self.sizes, self.rate, self.seed = sizes, rate, seed


@checked
def make(
    thing: object,
    share: UnitInterval | None = None,
    *,
    rule: Literal["a", "b"] | Literal["c"] = "a",
    name: Text = "",
    quick: Flag = False,
    number: PositiveInt | Literal["auto"] = "auto",
    **arguments: Annotated[Any, Of(Base)],
) -> Base:
    return Base(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 1.5}, "make: share=1.5 must be a finite number >= 0 and <= 1 or null"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": "0.5"}, "share='0.5'"),
        ({"share": True}, "share=True"),
        ({"rule": "d"}, "make: rule='d' must be one of a, b, c"),
        ({"rule": None}, "rule=None"),
        ({"quick": 1}, "quick=1 must be true, false"),
        ({"name": 3}, "name=3 must be text"),
        ({"number": 0}, "number=0 must be a whole number >= 1 or 'auto'"),
        ({"number": 2.0}, "number=2.0"),
        ({"rate": 0.0}, "make: rate=0.0 must be a finite number > 0"),
        ({"sizes": []}, "sizes=[] must be a list, each element a whole number >= 1"),
        ({"sizes": 3}, "sizes=3 must be a list"),
        ({"sizes": [[2]]}, "sizes=[[2]] must be a list"),
        ({"sizes": [None]}, "sizes=[None] must be a list"),
        ({"sizes": [2] * 999 + [0]}, "sizes=[2, 2, 2, 2, 2, 2, ...] must be a list"),
    ],
    ids=str,
)
def test_a_call_is_held_to_its_signature_in_one_line(arguments, message):
    with pytest.raises(ConfigurationError) as caught:
        make(None, **arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_by_place_are_checked_and_what_states_nothing_is_not():
    with pytest.raises(ConfigurationError, match="share=2"):
        make(None, 2)
    with pytest.raises(ConfigurationError, match="Base: sizes=.* must be a list"):
        Base([0])
    assert make(object(), seed="any", rate=2, sizes=(3, 4)).sizes == (3, 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        make(None, speed=1)


def test_a_checked_function_is_the_same_to_whoever_looks_at_it():
    assert list(inspect.signature(Base).parameters) == ["sizes", "rate", "seed"]
    assert inspect.signature(make).parameters["rule"].default == "a"
    assert pickle.loads(pickle.dumps(make_pmoe_actor)) is make_pmoe_actor
    assert pickle.loads(pickle.dumps(Base(rate=3.0))).rate == 3.0


def test_what_is_handed_on_is_stated_too_but_for_what_is_left_out():
    assert set(stated_parameters(make)) == {"share", "rule", "name", "quick", "number", "sizes", "rate"}
    assert stated_parameters(make)["rate"].default == 0.5
    whole, single = stated_parameters(make_pmoe_actor), stated_parameters(make_gaussian_actor)
    assert set(whole) - set(single) == {"num_components", "router", "deterministic"}
    arguments = {"rate": 1.0, "other": 2}
    assert take(arguments, Base) == {"rate": 1.0} and arguments == {"other": 2}


def test_a_choice_decides_whose_arguments_there_are():
    def transform(
        *, kind: Literal["plain", "based"] = "plain", **_: Annotated[Any, Of(Base, kind="based")]
    ) -> None: ...

    assert set(stated_parameters(transform, given={})) == {"kind"}
    assert set(stated_parameters(transform, given={"kind": "based"})) == {"kind", "sizes", "rate"}


@pytest.mark.parametrize(
    ("limit", "good", "bad"),
    [
        (Limit(), [0, -1.5], [float("nan"), float("inf"), True, "1", None, [1]]),
        (Limit(low=0, low_included=False), [1e-9, 5], [0, 0.0, -1]),
        (Limit(low=0, high=1, high_included=False), [0, 0.999], [1, 1.0]),
        (Limit(low=1, high=3), [1, 3], [0, 4]),
        (Limit(low=1, integer=True), [1, 10**400], [1.5, 2.0, True, 0]),
        (Limit(words=("a", "b"), numeric=False), ["a", "b"], ["c", "", 1]),
        (Limit(low=1, words=("auto",)), ["auto", 1], ["all", 0]),
        (Limit(words=("auto",), numeric=False, boolean=True), ["auto", True, False], ["yes", 1]),
        (Limit(text=True, numeric=False), ["", "any"], [1, True]),
    ],
)
def test_limits(limit, good, bad):
    assert all(limit.accepts(value) for value in good)
    assert not any(limit.accepts(value) for value in bad)
