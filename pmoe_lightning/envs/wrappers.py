"""A user's own wrappers around Gymnasium environments, by the names that a configuration gives them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium

from pmoe_lightning.envs.contract import default_dtype_kept
from pmoe_lightning.errors import ConfigurationError, error_line, is_exit

__all__ = ["find_wrappers"]

_WRITTEN = "env.wrappers=[module:Wrapper], with arguments env.wrappers=[{wrapper: module:Wrapper, argument: value}]"
Wrap = Callable[[gymnasium.Env], gymnasium.Env]


def find_wrappers(wrappers: Sequence[str | Mapping[str, Any]]) -> list[Wrap]:
    """What puts each wrapper around an environment, the innermost first; their modules are imported.

    Args:
        wrappers: each ``"module:Wrapper"``, or ``{"wrapper": "module:Wrapper", **arguments}``.

    Raises:
        ConfigurationError: that is written otherwise, or names no :class:`gymnasium.Wrapper`; when called, the wrapper
            cannot be made.
    """
    if isinstance(wrappers, str | Mapping) or not isinstance(wrappers, Sequence):
        raise ConfigurationError(f"env.wrappers={wrappers!r} is not a list: write {_WRITTEN}")
    return [_find(each) for each in wrappers]


def _find(written: str | Mapping[str, Any]) -> Wrap:
    arguments = dict(written) if isinstance(written, Mapping) else {"wrapper": written}
    given = arguments.pop("wrapper", None)
    name = given if isinstance(given, str) else ""
    module, _, attribute = name.partition(":")
    if not (module and attribute.isidentifier()):
        raise ConfigurationError(f"env.wrappers: {written!r} names no wrapper: write {_WRITTEN}")
    kind = _attribute(_imported(module), attribute, name)
    if not (isinstance(kind, type) and issubclass(kind, gymnasium.Wrapper)):
        what = f"a subclass of {kind.__mro__[1].__name__}" if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise ConfigurationError(f"env.wrappers: {name} is {what}, not of gymnasium.Wrapper")
    return partial(_put_around, kind, name, arguments)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except BaseException as error:  # whatever a module of somebody's may raise
        if not (isinstance(error, Exception) or is_exit(error)):
            raise
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        hint = ": install it, or put its folder into PYTHONPATH" if missing else ""
        raise ConfigurationError(
            f"env.wrappers: {module} cannot be imported: {error_line(error, named=not missing)}{hint}"
        ) from error


def _attribute(module: Any, attribute: str, name: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        wrappers = [key for key, value in vars(module).items() if isinstance(value, type)]
        close = difflib.get_close_matches(attribute, wrappers, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigurationError(f"env.wrappers: {name} does not exist in {module.__name__}{hint}") from None


def _put_around(
    kind: type[gymnasium.Wrapper], name: str, arguments: Mapping[str, Any], env: gymnasium.Env
) -> gymnasium.Env:
    try:
        with default_dtype_kept(name):
            wrapped = kind(env, **arguments)
            wrapped.unwrapped  # noqa: B018  (fails where its constructor has not called that of Wrapper)
    except ConfigurationError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_exit(error)):
            raise
        given = f" with {dict(arguments)}" if arguments else ""
        raise ConfigurationError(
            f"env.wrappers: {name} cannot be put around {env}{given}: {error_line(error, named=True)}"
        ) from error
    return wrapped
