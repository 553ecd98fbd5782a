"""What every configuration key must be: its type, the values it may take and its default.

Each is stated once, in the signature of the class or function that the file of a choice names as ``_target_``
(``limits``). Here such a signature, read from its source, becomes a dataclass, which Hydra merges under the file that
asks for it as ``/schema/<group>/<choice>``. A key that is not in it is refused; a value outside its limit is refused by
``validation.py``. Nothing heavy is imported, so that ``--help`` stays fast.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pmoe_lightning.configuration.signatures import find, read_parameters
from pmoe_lightning.limits import Flag, Limit, Parameter, PositiveInt, Seed, Text, stated

#: Of Lightning's Trainer, what a run can be given; the rest is the program's own.
_TRAINER = {
    "accelerator": Literal["auto", "cpu", "cuda", "gpu"],
    "devices": PositiveInt | Literal["auto"],
    "num_nodes": PositiveInt,
    "strategy": Literal["auto", "ddp"],
    "deterministic": Flag,
    "detect_anomaly": Flag,
    "profiler": Literal["simple", "advanced", "pytorch"] | None,
}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where it is built


@cache
def schemas() -> dict[str, dict[str, type]]:
    """The dataclass of every choice of every group whose file asks for one."""
    found: dict[str, dict[str, type]] = {}
    for group, choice, written in _files():
        target = written["_target_"]
        known = stated(_TRAINER) if target == "lightning.pytorch.Trainer" else read_parameters(target, written)
        found.setdefault(group, {})[choice] = _schema(choice, known, written)
    return found


@cache
def root_schema() -> type:
    """The keys at the top. ``experiment`` and ``debug`` are groups that change these and add none."""
    keys = {
        "seed": Seed,
        "total_frames": PositiveInt,
        "num_threads": Annotated[int, Limit(low=1, high=1024)],  # a mistyped number would start them all
        "init_from": Text | None,
        "resume": Text | None,
        "compile": Flag | Literal["auto"],
        "matmul_precision": find("pmoe_lightning.modules.networks.MatmulPrecision"),
    }
    groups = ("algo", "actor", "estimator", "env", "data", "trainer", "callbacks")
    fields: dict[str, tuple[str, Any, Any]] = {group: (group, Any, MISSING) for group in groups}
    fields |= {group: (group, Any, None) for group in ("critic", "encoder", "action_transform", "safe", "logger")}
    fields["callbacks"] = ("callbacks", dict[str, Any], dataclasses.field(default_factory=dict))
    fields |= {key: _field(key, parameter) for key, parameter in stated(keys).items()}
    return dataclasses.make_dataclass("Configuration", fields.values())


@cache
def register() -> None:
    """Make the schemas known to Hydra as ``schema/<group>/<choice>``."""
    store = ConfigStore.instance()
    store.store(group="schema", name="configuration", node=root_schema())
    for group, choices in schemas().items():
        for choice, schema in choices.items():
            store.store(group=f"schema/{group}", name=choice, node=schema)
    seen = read_parameters("pmoe_lightning.envs.pixels.pixel_settings")
    fields = [_field(key, parameter) for key, parameter in seen.items()]
    # A part of every file of ``env`` that asks for it.
    store.store(group="schema/env_pixels", name="seen", node=dataclasses.make_dataclass("seen", fields))


def fields_of(schema: type) -> dict[str, dataclasses.Field]:
    """The keys of a node whose type this is; a plain one declares none."""
    return {field.name: field for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}


def parameters_of(schema: type) -> dict[str, Parameter]:
    """What the keys of a node may be whose type this is; of a plain one nothing is known."""
    return {name: field.metadata["parameter"] for name, field in fields_of(schema).items() if field.metadata}


def _files() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, choice, and the part with ``_target_`` of every file that asks for a schema of its own."""
    for folder in files("pmoe_lightning.conf").iterdir():
        for file in folder.iterdir() if folder.is_dir() else ():
            choice = file.name.removesuffix(".yaml")
            text = file.read_text(encoding="utf-8") if choice != file.name else ""
            if f"/schema/{folder.name}/{choice}@" in text:
                written = yaml.load(text, _Loader)
                yield folder.name, choice, next(part for part in (written, *written.values()) if "_target_" in part)


def _schema(name: str, parameters: Mapping[str, Parameter], written: Mapping[str, Any]) -> type:
    # What only the file has, an interpolation or what run/ reads, is of no type but a switch's.
    others = [key for key in written if key not in parameters and not key.startswith("_") and key != "defaults"]
    fields = [("_target_", str, MISSING)] + [_field(key, parameter) for key, parameter in parameters.items()]
    fields += [("_partial_", bool, False)] * ("_partial_" in written)
    fields += [(key, bool if isinstance(written[key], bool) else Any, MISSING) for key in others]
    return dataclasses.make_dataclass(name, fields)


def _field(name: str, parameter: Parameter) -> tuple[str, Any, Any]:
    kind: Any = _kind(parameter.limit)
    default = parameter.default
    if parameter.many:
        kind = list[kind]
    if parameter.optional:
        kind = Optional[kind]  # noqa: UP045  (OmegaConf reads typing.Optional)
    if default is inspect.Parameter.empty:
        default = MISSING
    metadata = {"parameter": parameter}
    if isinstance(default, tuple):
        return name, kind, dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return name, kind, dataclasses.field(default=default, metadata=metadata)


def _kind(limit: Limit) -> Any:
    """The type that OmegaConf holds a value to."""
    number = [int if limit.integer else float] if limit.numeric else []
    kinds = [bool] * limit.boolean + number + [str] * bool(limit.words or limit.text)
    return Union[tuple(kinds)]  # noqa: UP007
