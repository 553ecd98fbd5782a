"""Signatures read from source files, because importing those that the configuration names would take seconds.

Of a module this understands what a signature may be written with: builtins, the standard library, the vocabulary of
``limits``, constants and aliases. Everything else, a tensor or a network, is no value of a configuration.
"""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import resolve_name
from inspect import Parameter as Inspected
from pathlib import Path
from typing import Any, NamedTuple

import pmoe_lightning
from pmoe_lightning import limits
from pmoe_lightning.limits import Parameter, Signature, stated_parameters

_LAZY = "_HOMES"  # of the packages whose public names load on first use, see ``lazy``
_REFERENCE = re.compile(r"see `(\w+)`\.")
_ARGUMENT = re.compile(r"^ {4}([\w*, ]+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


class Source(NamedTuple):
    """A class or function where it is written."""

    module: str
    node: ast.ClassDef | ast.FunctionDef


def find(name: str) -> Any:
    """What a dotted name of this package stands for: a :class:`Source`, or the value of a constant or alias."""
    module, _, last = name.rpartition(".")
    return _names(module)[last]


def read_parameters(name: str, given: Mapping[str, Any] | None = None) -> dict[str, Parameter]:
    """The arguments of a class or function that state a limit, by its dotted name; see ``stated_parameters``."""
    return stated_parameters(find(name), _read_signature, given)


class _Names(dict):
    """What the names at the top of a module stand for, looked up when asked for."""

    def __init__(self, module: str) -> None:
        super().__init__()
        path = _path(module)
        self.module, self.tree = module, _parse(path)
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def __missing__(self, name: str) -> Any:
        self[name] = found = self._look_up(name)
        return found

    def _look_up(self, name: str) -> Any:
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
                return Source(self.module, statement)
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return self.evaluate(statement.value)
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return _imported(self._absolute(statement), alias.name)
        if name != _LAZY and _LAZY in self and name in (homes := self[_LAZY]):
            return _names(f"{self.module}.{homes[name]}")[name]
        raise KeyError(name)  # a builtin, or unknown

    def _absolute(self, statement: ast.ImportFrom) -> str:
        return resolve_name("." * statement.level + (statement.module or ""), self.package)

    def __contains__(self, name: object) -> bool:
        try:
            self[name]
        except KeyError:
            return False
        return True

    def evaluate(self, expression: ast.expr) -> Any:
        if isinstance(expression, ast.Constant):  # as most defaults are
            return expression.value
        return eval(compile(ast.Expression(expression), self.module, "eval"), {}, self)


_names = cache(_Names)


def _parse(path: Path) -> ast.Module:
    """The tree of a file without what its functions do, which is most of it."""
    collects = gc.isenabled()
    gc.disable()  # while Python 3.11 makes a tree, no finalizer may parse as well, or it loses count
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for statement in tree.body:
            for part in (statement, *getattr(statement, "body", ())):
                if isinstance(part, ast.FunctionDef):
                    del part.body[1:]  # the docstring stays
        return tree
    finally:
        if collects:
            gc.enable()


def _path(module: str) -> Path:
    # Not by ``importlib``, which would import the packages above it.
    parts = module.split(".")[1:]
    for folder in pmoe_lightning.__path__:
        place = Path(folder, *parts)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{module} has no source file")


def _imported(module: str, name: str) -> Any:
    if module == limits.__name__:
        return getattr(limits, name)
    if module.split(".")[0] == "pmoe_lightning":
        return _names(module)[name]
    if module.split(".")[0] in sys.stdlib_module_names:
        return getattr(import_module(module), name)
    raise KeyError(name)


def _read_signature(source: Source) -> Signature:
    """As ``limits.read_signature``; the annotation of what no configuration can hold is None."""
    names, meanings = _names(source.module), _meanings(source.node)
    arguments = _arguments(source.node)
    if arguments is None:
        written = source.node.bases if isinstance(source.node, ast.ClassDef) else []
        bases = [names[base.id] for base in written if isinstance(base, ast.Name) and base.id in names]
        return next((_read_signature(base) for base in bases if isinstance(base, Source)), {})

    def evaluate(expression: ast.expr | None, otherwise: Any) -> Any:
        if expression is None:
            return otherwise
        try:
            return names.evaluate(expression)
        except (NameError, TypeError, AttributeError):  # of another library, or an object
            return otherwise

    signature = {}
    for name, annotation, default in arguments:
        kind = evaluate(annotation, None)
        value = Inspected.empty if kind is None else evaluate(default, Inspected.empty)
        signature[name] = (kind, value, _meaning(names, meanings, name))
    return signature


def _arguments(
    node: ast.ClassDef | ast.FunctionDef,
) -> list[tuple[str, ast.expr | None, ast.expr | None]] | None:
    """Name, annotation and default of every argument as it is written; None where a class takes those of its base."""
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not inits and "dataclass" in map(_name, node.decorator_list):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return [(_name(field.target), field.annotation, field.value) for field in fields]
        return _arguments(inits[0]) if inits else None
    positional = [*node.args.posonlyargs, *node.args.args]
    missing = [None] * (len(positional) - len(node.args.defaults))
    defaults = [*missing, *node.args.defaults, *node.args.kw_defaults, None]
    last = [node.args.kwarg] if node.args.kwarg else []
    named = [*positional, *node.args.kwonlyargs, *last]
    return [(argument.arg, argument.annotation, default) for argument, default in zip(named, defaults, strict=False)]


def _name(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _meaning(names: _Names, meanings: Mapping[str, str], name: str) -> str:
    """What is said of an argument, there or where its docstring refers to."""
    said = meanings.get(name, "")
    reference = _REFERENCE.fullmatch(said)
    source = names[reference[1]] if reference and reference[1] in names else None
    return _meanings(source.node).get(name, said) if isinstance(source, Source) else said


def _meanings(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """What the docstring says of each argument."""
    _, _, said = (ast.get_docstring(node) or "").partition("\nArgs:")
    said = re.split(r"\n\n(?! )", said)[0]
    found: dict[str, str] = {}
    for names, meaning in _ARGUMENT.findall(said):
        found |= dict.fromkeys(names.replace("*", "").split(", "), " ".join(meaning.replace("``", "`").split()))
    return found
