"""What an argument may be, said once: in the signature of the class or function that takes it.

    def __init__(self, *, weight: NonNegativeFloat = 1.0, rank_by: Literal["q", "soft_q"] = "q") -> None:

``checked`` holds every call to it. The configuration, its help and the description in a checkpoint read the same
signature: an argument that states a limit is a key of the configuration, with its default; what states none is an
object or a number that the run itself hands over.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pmoe_lightning.errors import ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Limit:
    """Values to accept: finite numbers in an interval, one of some words, any text, true and false, or any of these."""

    low: float = -inf
    high: float = inf
    low_included: bool = True
    high_included: bool = True
    words: tuple[str, ...] = ()
    numeric: bool = True
    integer: bool = False
    text: bool = False
    boolean: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether the value is allowed."""
        if isinstance(value, str | PathLike):
            return self.text or value in self.words
        if isinstance(value, bool):
            return self.boolean
        if not self.numeric or not isinstance(value, Integral if self.integer else Real):
            return False
        number: Any = value  # any kind of number, however large
        above = self.low <= number if self.low_included else self.low < number
        below = number <= self.high if self.high_included else number < self.high
        return above and below and -inf < number < inf

    def __str__(self) -> str:
        """What is allowed, to complete the sentence 'must be ...'."""
        parts = [f"one of {', '.join(self.words)}" if len(self.words) > 1 else repr(word) for word in self.words[:1]]
        if self.numeric:
            bounds = [f">{'=' * self.low_included} {self.low}"] * (self.low > -inf)
            bounds += [f"<{'=' * self.high_included} {self.high}"] * (self.high < inf)
            kind = "a whole number" if self.integer else "a finite number"
            parts.insert(0, " ".join([kind, " and ".join(bounds)]).strip())
        return " or ".join(["true, false"] * self.boolean + parts + ["text"] * self.text)


Flag = Annotated[bool, Limit(boolean=True, numeric=False)]
Text = Annotated[str, Limit(text=True, numeric=False)]
FiniteFloat = Annotated[float, Limit()]
PositiveFloat = Annotated[float, Limit(low=0, low_included=False)]
NonNegativeFloat = Annotated[float, Limit(low=0)]
UnitInterval = Annotated[float, Limit(low=0, high=1)]
PositiveInt = Annotated[int, Limit(low=1)]
NonNegativeInt = Annotated[int, Limit(low=0)]
Seed = Annotated[int, Limit(low=0, high=2**31 - 1)]
#: The most units of a layer, or of what a layer has side by side: beyond it, a checkpoint could ask for all memory.
MAX_WIDTH = 65_536
Width = Annotated[int, Limit(low=1, high=MAX_WIDTH)]


class Of:
    """In the annotation of ``**arguments``: they are those of another class or function.

        def make_sac(actor, **arguments: Annotated[Any, Of(SAC)]) -> SAC: ...

    Args:
        target: the class or function.
        without: the names that are not handed on.
        **when: values of other arguments for which alone it is so.
    """

    def __init__(self, target: Any, *, without: Collection[str] = (), **when: Any) -> None:
        self.target, self.without, self.when = target, without, when


class Parameter(NamedTuple):
    """An argument that states a limit."""

    limit: Limit
    optional: bool
    """Whether it may be None."""
    many: bool
    """Whether it is a list of such values."""
    default: Any
    """``inspect.Parameter.empty`` where there is none."""
    meaning: str
    """What the docstring says of it, where that was read."""

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if not self.many:
            return self.limit.accepts(value)
        is_list = isinstance(value, Sequence | Set) and not isinstance(value, str)  # Hydra has lists of its own
        return is_list and len(value) > 0 and all(map(self.limit.accepts, value))

    def __str__(self) -> str:
        """What is allowed, to complete the sentence 'must be ...'."""
        return "a list, each element " * self.many + str(self.limit) + " or null" * self.optional


#: Annotation, default and meaning of every argument of a class or function, by name.
Signature = Mapping[str, tuple[Any, Any, str]]


def read_signature(target: Any) -> Signature:
    """Of an object."""
    written: Any = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009 (as mypy asks)
    hints = get_type_hints(written, include_extras=True)
    parameters = inspect.signature(target).parameters
    return {name: (hints.get(name), parameter.default, "") for name, parameter in parameters.items()}


def stated_parameters(
    target: Any,
    read: Callable[[Any], Signature] = read_signature,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Parameter]:
    """The arguments that state a limit, with those of what ``**arguments`` are handed on to (``Of``).

    Args:
        target: a class or function, or what stands for one.
        read: how the signature of such a target is read.
        given: what is chosen, where some arguments belong to a choice; by default those of all choices.
    """
    own: dict[str, Parameter] = {}
    passed_on: dict[str, Parameter] = {}
    signature = read(target)
    for name, (annotation, default, meaning) in signature.items():
        for link in getattr(annotation, "__metadata__", ()):
            if isinstance(link, Of) and (
                given is None or all(given.get(key, signature[key][1]) == value for key, value in link.when.items())
            ):
                further = stated_parameters(link.target, read, given)
                passed_on |= {key: found for key, found in further.items() if key not in link.without}
        statement = _statement(annotation)
        if statement is not None:
            own[name] = Parameter(*statement, default, meaning)
    for name in own.keys() & passed_on.keys():  # stated anew, with another default
        own[name] = own[name]._replace(meaning=own[name].meaning or passed_on[name].meaning)
    return own | {name: parameter for name, parameter in passed_on.items() if name not in signature}


def stated(annotations: Mapping[str, Any]) -> dict[str, Parameter]:
    """The same of annotations that stand alone, without defaults."""
    empty = inspect.Parameter.empty
    return stated_parameters(None, lambda _: {name: (said, empty, "") for name, said in annotations.items()})


def check_arguments(target: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse the first of these arguments that is not what the signature states.

    Raises:
        ConfigurationError: in one line, whose argument, its value and what it must be.
    """
    for name, parameter in _parameters(target).items():
        if name in arguments and not parameter.accepts(arguments[name]):
            whose = target.__qualname__.removesuffix(".__init__")
            raise ConfigurationError(f"{whose}: {name}={reprlib.repr(arguments[name])} must be {parameter}")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function, or ``__init__``, that refuses what its signature does not allow, as ``check_arguments`` does."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(function, {**dict(zip(names, args, strict=False)), **kwargs})
        return function(*args, **kwargs)

    return wrapper


def take(arguments: dict[str, Any], target: Any) -> dict[str, Any]:
    """Remove from the arguments those that a class or function states a limit for, and return them."""
    return {name: arguments.pop(name) for name in _parameters(target) if name in arguments}


@functools.cache
def _parameters(target: Any) -> dict[str, Parameter]:
    return stated_parameters(target)


def _statement(annotation: Any) -> tuple[Limit, bool, bool] | None:
    """Limit, whether None is allowed, whether it is a list; None where nothing is stated."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limit = next((found for found in annotation.__metadata__ if isinstance(found, Limit)), None)
        return _statement(members[0]) if limit is None else (replace(limit, integer=members[0] is int), False, False)
    if origin is Literal:
        return Limit(words=members, numeric=False), False, False
    if origin in (Union, UnionType):
        parts = [_statement(member) for member in members if member is not NoneType]
        if None in parts:
            return None
        limits, optional, many = zip(*parts, strict=True)
        return _either(limits), NoneType in members or any(optional), any(many)
    if origin in (Sequence, Collection, list) and (element := _statement(members[0])) is not None:
        return element[0], False, True
    return None


def _either(limits: Sequence[Limit]) -> Limit:
    """What any of them accepts, of which at most one is of numbers."""
    numbers = next((limit for limit in limits if limit.numeric), Limit(numeric=False))
    words = tuple(word for limit in limits for word in limit.words)
    return replace(numbers, words=words, text=any(x.text for x in limits), boolean=any(x.boolean for x in limits))
