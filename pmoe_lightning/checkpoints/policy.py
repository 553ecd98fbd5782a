"""A policy from the data of a checkpoint.

A checkpoint's entry ``"policy"`` holds ``description`` (which actor, its arguments, the action bounds, the
environment), ``state_dict`` and, where the algorithm has them, the state dicts of its critics of actions as
``action_values`` and its temperature as ``alpha``.
The description is data: it selects among the factories below, and every value of it must be what their signatures allow
(``limits``), so a file can neither name code to run nor ask for a network of absurd size.
"""

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import nn

from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.errors import ConfigurationError, RunError, first_line
from pmoe_lightning.hamiltonian import EvolveAction, make_hamiltonian_transform
from pmoe_lightning.limits import MAX_WIDTH, check_arguments
from pmoe_lightning.modules.actors import (
    BestValueActor,
    make_additive_moe_actor,
    make_gaussian_actor,
    make_mcp_actor,
    make_pmoe_actor,
)
from pmoe_lightning.modules.critics import QValueEnsemble, make_layer_norm_network, make_qvalue_network
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.modules.encoders import PixelEncoder, make_drq_encoder
from pmoe_lightning.modules.flow import FlowRule, make_flow_actor, spline_parameters
from pmoe_lightning.modules.latent import LatentRule, make_latent_actor
from pmoe_lightning.modules.networks import make_mlp
from pmoe_lightning.modules.normalization import ObservationNormalizer
from pmoe_lightning.modules.option_policies import OptionActor, make_option_actor
from pmoe_lightning.safe.candidates import SafePolicy
from pmoe_lightning.safe.constraint import CostConstraint, SafeValues

ACTORS: dict[str, Callable[..., TensorDictModule]] = {
    "additive_moe": make_additive_moe_actor,
    "flow": make_flow_actor,
    "gaussian": make_gaussian_actor,
    "latent": make_latent_actor,
    "mcp": make_mcp_actor,
    "options": make_option_actor,
    "pmoe": make_pmoe_actor,
}
#: Actors of which no component can be told apart: what they do where nothing is drawn.
_ONE_RULE = {"flow": get_args(FlowRule)[0], "latent": get_args(LatentRule)[0]}
CRITICS: dict[str, Callable[..., TensorDictModule]] = {
    "crossq": make_crossq_network,
    "layer_norm": make_layer_norm_network,
    "plain": make_qvalue_network,
}
ENCODERS: dict[str, Callable[..., PixelEncoder]] = {"drq": make_drq_encoder}
FORMAT = 1
_NUM_CRITICS = 2
_MAX_PARAMETERS = 500_000_000
_MAX_PIXELS = 16 * 3 * 512 * 512


def policy_entry(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Any]:
    """The entry ``"policy"`` of a checkpoint, its description checked, its critics those of normalised actions.

    Raises:
        RunError: names what is missing or impossible.
    """
    entry = _get(checkpoint, "policy", dict, where)
    description = _get(entry, "description", dict, f"{where}, policy")
    _get(entry, "state_dict", Mapping, f"{where}, policy")
    if not isinstance(entry.get("alpha"), float | None):
        raise RunError(f"{where}, policy: alpha {entry['alpha']!r} is not a number")
    place = f"{where}, policy.description"
    if description.get("format") != FORMAT:
        raise RunError(f"{place}: format {description.get('format')!r} is not {FORMAT}, the one this version reads")
    actor, own = _get(description, "actor", str, place), _own_parts(description, place)
    size = _get(description, "observation_dim", int, place)
    if not 1 <= size <= MAX_WIDTH:
        raise RunError(f"{place}: observation_dim {size} is out of range")
    low, high = (_numbers(description, key, place) for key in ("action_low", "action_high"))
    if not low or len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
        raise RunError(f"{place}: action_low and action_high are not ordered bounds of the same length")
    _check_choice(description.get("rule_chosen"), f"{place}.rule_chosen")
    units = description.get("action_units", "environment")
    if units not in ("normalized", "environment"):
        raise RunError(f"{place}: unknown action_units {units!r}")
    _get(description, "normalize_observation", bool, place)
    environment = _get(description, "env", dict, place)
    _get(environment, "id", str, f"{place}.env")
    given = _get(environment, "kwargs", dict, f"{place}.env")
    reserved = {"id", "num_envs", "seed", "render_mode", "carry"}.intersection(given)
    if reserved:
        raise RunError(f"{place}.env: kwargs must not hold {', '.join(sorted(reserved))}")
    arguments = _get(description, "arguments", dict, place)
    if actor in ACTORS:
        _check_arguments(ACTORS[actor], arguments, f"{place}.arguments")
        besides = _of_splines(arguments, len(low)) if actor == "flow" else 0
        _check_size(arguments, size, len(low), f"{place}.arguments", besides)
    if description.get("action_transform") is not None and "action_transform" not in own:
        transform = _get(description, "action_transform", dict, place)
        _get(transform, "used_in", list, f"{place}.action_transform")
        _check_arguments(make_hamiltonian_transform, transform, f"{place}.action_transform")
    if description.get("safe") is not None and "safe" not in own:
        _check_arguments(CostConstraint, _get(description, "safe", dict, place), f"{place}.safe")
    if description.get("encoder") is not None and "encoder" not in own:
        _check_encoder(_get(description, "encoder", dict, place), size, f"{place}.encoder")
    return entry if units == "normalized" else _with_normalized_actions(entry)


def _with_normalized_actions(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry whose critics read actions in units of the environment, as all did once, as one of today.

    Of a = c + h n a first layer makes W a + b = (W h) n + (b + W c). What does not fit is left for the load to refuse.
    """
    description = entry["description"]
    low, high = (torch.tensor(description[key], dtype=torch.float32) for key in ("action_low", "action_high"))
    center, half_range, size = (high + low) / 2, (high - low) / 2, description["observation_dim"]

    def normalized(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        state_dict = dict(state_dict)
        for key in [key for key in state_dict if str(key).endswith("module.layers.0.weight")]:
            weight: Any = state_dict[key]
            bias: Any = state_dict.get(key.removesuffix("weight") + "bias")
            fits = all(isinstance(value, torch.Tensor) and value.ndim for value in (weight, bias))
            if fits and weight.shape[-1] == size + len(low) and weight.shape[:-1] == bias.shape:
                of_state, of_action = weight.split([size, len(low)], -1)
                state_dict[key] = torch.cat([of_state, of_action * half_range], -1)
                state_dict[key.removesuffix("weight") + "bias"] = bias + of_action @ center
        return state_dict

    critics = entry.get("action_values")
    if isinstance(critics, list) and all(isinstance(critic, Mapping) for critic in critics):
        critics = [normalized(critic) for critic in critics]
    return {
        **entry,
        "description": {**description, "action_units": "normalized"},
        "state_dict": normalized(entry["state_dict"]),
        "action_values": critics,
    }


def build_policy(
    entry: Mapping[str, Any],
    *,
    device: str | torch.device = "cpu",
    rule: str | None = None,
    parts: Mapping[str, Callable[..., Any]] | None = None,
    where: str = "the checkpoint",
) -> LoadedPolicy:
    """The policy of a checked entry (:func:`policy_entry`); arguments and errors as :func:`load_policy`."""
    description = entry["description"]
    arguments = dict(description["arguments"])
    rule = rule or trained_rule(entry)
    if rule != (own := _ONE_RULE.get(description["actor"], rule)):
        raise RunError(f"{where}: actor {description['actor']} has one rule, {own}, and cannot act by rule={rule}")
    if description["actor"] in ACTORS or "deterministic" in arguments:
        arguments["deterministic"] = "max_weight" if rule == "best_value" else rule
    sizes = {key: description[key] for key in ("observation_dim", "action_low", "action_high")}
    factories = _chosen_parts(description, parts or {}, where)
    try:
        actor = factories["actor"](**sizes, **arguments)
        encoder = _make_encoder(description, factories)
        first: list[Any] = [] if encoder is None else [encoder]
        first += [ObservationNormalizer(sizes["observation_dim"])] if description["normalize_observation"] else []
        modules = [actor, *(transform := _make_transform(description, factories, actor, where))]
        safe = _make_safe(description, factories, actor, transform, where)
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}, policy.description: {first_line(error)}") from error
    policy = _sequence([*first, safe(_sequence(modules))])
    try:
        policy.load_state_dict(entry["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise RunError(f"{where}, policy.state_dict does not fit its description: {reason}") from error
    if rule == "best_value":
        best = BestValueActor(actor, build_critics(entry, parts, where))
        modules = [best if module is actor else module for module in modules]
        policy = _sequence([*first, safe(_sequence(modules))])
    for module in policy.modules():
        if isinstance(module, ProbabilisticTensorDictModule | OptionActor | EvolveAction | SafePolicy):
            module.default_interaction_type = InteractionType.DETERMINISTIC
    shape = None if encoder is None else tuple(encoder.shape)
    return LoadedPolicy(policy, description["observation_dim"], shape).to(device).eval()


def own_parts(description: Mapping[str, Any]) -> dict[str, str]:
    """The options that a checked description names and this package does not have, by their groups."""
    actor = {} if description["actor"] in ACTORS else {"actor": description["actor"]}
    return actor | description.get("own_parts", {})


def _own_parts(description: Mapping[str, Any], where: str) -> dict[str, str]:
    own = description.get("own_parts", {})
    if not isinstance(own, dict) or not all(isinstance(text, str) for pair in own.items() for text in pair):
        raise RunError(f"{where}: own_parts {own!r} are not names by groups")
    return own


def _chosen_parts(
    description: Mapping[str, Any], given: Mapping[str, Callable[..., Any]], where: str
) -> dict[str, Callable[..., Any]]:
    """What each part of the policy is made by: this package's factories, or those given for the names it does not know.

    Raises:
        RunError: one is missing.
    """
    actor = description["actor"]
    chosen: dict[str, Any] = {"actor": given.get(f"actor/{actor}", ACTORS.get(actor))}
    chosen |= {"action_transform": make_hamiltonian_transform, "safe": CostConstraint, "encoder": None}
    for group, name in own_parts(description).items():
        key = f"{group}/{name}"
        if key not in given and group != "env":  # whoever steps the environment sees to that
            known = f"; known: {', '.join(ACTORS)}" if group == "actor" else ""
            raise RunError(
                f"{where}, policy.description: unknown {group} {name!r}{known}; if it is your own, give the "
                f"--config-dir that holds {key}.yaml, or load_policy(..., parts={{{key!r}: its factory}})"
            )
        chosen[group] = given.get(key)
    return chosen


def trained_rule(entry: Mapping[str, Any]) -> str:
    """The deterministic rule that a checked entry was judged by in training.

    ``best_value`` is ``max_weight`` where the algorithm learns no action values.
    """
    description = entry["description"]
    rule = description["arguments"].get("deterministic", _ONE_RULE.get(description["actor"], "max_weight"))
    return rule if rule != "best_value" or entry.get("action_values") else "max_weight"


def leaves_rule_open(description: Mapping[str, Any] | None) -> bool:
    """Whether the rule is to be chosen: the actor has rules and says ``best_value``, its default, or one was chosen."""
    if not description:
        return False
    return "rule_chosen" in description or description["arguments"].get("deterministic") == "best_value"


def candidate_rules(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The deterministic rules that a checked entry could act by; one alone where there is nothing to choose.

    Several has only a mixture of several components of this package's: ``mean``, ``max_weight`` and, where the entry
    has action values, ``best_value``. ``sample_component`` draws, and is none.
    """
    description = entry["description"]
    if description["actor"] != "pmoe" or description["arguments"].get("num_components", 4) < 2:
        return (trained_rule(entry),)
    return ("mean", "max_weight", "best_value") if entry.get("action_values") else ("mean", "max_weight")


def _sequence(parts: list[TensorDictModule]) -> TensorDictModule:
    return parts[0] if len(parts) == 1 else TensorDictSequential(*parts)


def build_critics(
    entry: Mapping[str, Any], parts: Mapping[str, Callable[..., Any]] | None = None, where: str = "the checkpoint"
) -> list[TensorDictModule]:
    """The action-value networks of a checked entry: what the actor reads and the action normalised to [-1, 1] make
    ``state_action_value``. ``parts`` as for :func:`load_policy`.

    Raises:
        RunError: the entry holds none, or they do not fit their description.
    """
    state_dicts = entry.get("action_values")
    if not state_dicts:
        raise RunError(f"{where} holds no action values to rank components by: use rule=max_weight")
    factories = _chosen_parts(entry["description"], parts or {}, where)
    critics = []
    for state_dict in state_dicts:
        try:
            critic = make_critic(entry["description"], factories, where)
            critic.load_state_dict(state_dict)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise RunError(f"{where}, policy.action_values do not fit their description: {reason}") from error
        critics.append(critic)
    return critics


def make_critic(
    description: Mapping[str, Any],
    parts: Mapping[str, Callable[..., Any]] | None = None,
    where: str = "the checkpoint",
) -> TensorDictModule:
    """A critic of the kind and the sizes that a checked description says, its weights not loaded.

    One that says no kind is plain. ``parts["critic"]`` makes one of the user's own.
    """
    described, place = description.get("critic", {}), f"{where}, policy.description.critic"
    observations, actions = description["observation_dim"], len(description["action_low"])
    key = description["arguments"].get("observation_key", "observation")
    if "critic" in own_parts(description):
        return (parts or {})["critic"](observations, actions, **described, observation_key=key)
    kind = described.get("kind", "plain")
    if not isinstance(kind, str) or kind not in CRITICS:
        raise RunError(f"{place}: unknown kind {kind!r}; known: {', '.join(CRITICS)}")
    sizes: dict[str, Any] = {key: described.get(key) for key in ("hidden_sizes", "activation")}
    _check_arguments(make_mlp, sizes, place)
    _check_size(sizes, observations + actions, 1, place)
    return CRITICS[kind](observations, actions, **sizes, observation_key=key)


def _make_encoder(description: Mapping[str, Any], parts: Mapping[str, Callable]) -> Any:
    """What is in front of a policy that sees pixels, its weights not loaded; None for one that sees its state."""
    described = description.get("encoder")
    if described is None:
        return None
    own: Callable[..., Any] | None = parts["encoder"]
    factory = ENCODERS[described["kind"]] if own is None else own
    return factory(**{key: value for key, value in described.items() if key != "kind"})


def _check_encoder(described: Mapping[str, Any], features: int, where: str) -> None:
    """Reject an encoder that this package does not have, or that would not make the actor's observation."""
    kind, shape = _get(described, "kind", str, where), _get(described, "shape", list, where)
    if kind not in ENCODERS:
        raise RunError(f"{where}: unknown kind {kind!r}; known: {', '.join(ENCODERS)}")
    _check_arguments(ENCODERS[kind], {key: value for key, value in described.items() if key != "kind"}, where)
    sides = [side for side in shape if type(side) is int and 1 <= side <= MAX_WIDTH]
    if len(shape) != 3 or sides != shape or math.prod(sides) > _MAX_PIXELS:
        raise RunError(f"{where}: shape {shape!r} is not that of pixels, [C, H, W]")
    if described.get("features", features) != features:
        raise RunError(f"{where}: features {described['features']} are not the actor's observation_dim {features}")
    channels = described.get("channels", [])
    if max(channels, default=0) ** 2 * 9 * len(channels) > _MAX_PARAMETERS:
        raise RunError(f"{where}: the encoder would have more than {_MAX_PARAMETERS} parameters")


def _make_transform(
    description: Mapping[str, Any], parts: Mapping[str, Callable], actor: TensorDictModule, where: str
) -> list[EvolveAction]:
    """The action transform behind the actor, its weights not loaded; none where the policy acts without."""
    arguments = description.get("action_transform")
    if arguments is None or "acting" not in arguments["used_in"]:
        return []
    values = _make_values(description, parts, where)
    sizes = {"observation_dim": description["observation_dim"], "action_dim": len(description["action_low"])}
    transform = parts["action_transform"](**sizes, **arguments)
    bounds = (torch.tensor(description[key]) for key in ("action_low", "action_high"))
    return [EvolveAction(transform, values, nn.Parameter(torch.zeros(())), *bounds, observation_key=actor.in_keys[0])]


def _make_safe(
    description: Mapping[str, Any],
    parts: Mapping[str, Callable],
    actor: TensorDictModule,
    transform: list[EvolveAction],
    where: str,
) -> Callable[[TensorDictModule], TensorDictModule]:
    """What makes the policy a safe one where it was trained so; its weights not loaded."""
    if description.get("safe") is None:
        return lambda policy: policy
    constraint = parts["safe"](**description["safe"])
    values: Any = transform[0].qvalue if transform else _make_values(description, parts, where)
    bounds = [torch.tensor(description[key]) for key in ("action_low", "action_high")]
    return lambda policy: SafePolicy(policy, values, constraint, *bounds, observation_key=actor.in_keys[0])


def _make_values(description: Mapping[str, Any], parts: Mapping[str, Callable[..., Any]], where: str) -> nn.Module:
    """The critics that a policy acts with, of cost too for a safe one, their weights not loaded."""

    def ensemble() -> QValueEnsemble:
        critics = [make_critic(description, parts, where) for _ in range(_NUM_CRITICS)]
        return QValueEnsemble(critics[0].module, TensorDict.from_modules(*critics, as_module=True))

    if description.get("safe") is None:
        return ensemble()
    return SafeValues(ensemble(), ensemble(), nn.Parameter(torch.zeros(())))


def _get(mapping: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in mapping:
        raise RunError(f"{where}: entry {key!r} is missing; was the file written by pmoe_lightning?")
    value = mapping[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RunError(f"{where}: entry {key!r} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _numbers(mapping: Mapping[str, Any], key: str, where: str) -> list[float]:
    values = _get(mapping, key, list, where)
    if len(values) > MAX_WIDTH or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    ):
        raise RunError(f"{where}: entry {key!r} is not a list of finite numbers")
    return values


def _check_arguments(part: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Reject what the signature of the part does not allow. What it does not know, it refuses when called."""
    if not all(isinstance(key, str) for key in arguments):
        raise RunError(f"{where}: the names of arguments must be text")
    try:
        check_arguments(part, arguments)
    except ConfigurationError as error:
        raise RunError(f"{where}: {first_line(error)}") from error
    if not isinstance(arguments.get("observation_key", ""), str):
        raise RunError(f"{where}: observation_key {arguments['observation_key']!r} is not text")


def _check_choice(chosen: Any, where: str) -> None:
    """What a description may say of how its rule was chosen: ``evaluation.rules.RuleChoice`` in plain values."""
    if chosen is None:
        return
    kinds = {"rule": str, "returns": dict, "episodes": int, "seed": int}
    if not isinstance(chosen, dict) or chosen.keys() != kinds.keys():
        raise RunError(f"{where} {chosen!r} does not say rule, returns, episodes and seed")
    for key, kind in kinds.items():
        _get(chosen, key, kind, where)
    if not all(isinstance(rule, str) and isinstance(mean, float) for rule, mean in chosen["returns"].items()):
        raise RunError(f"{where}: returns {chosen['returns']!r} are not numbers by rules")


def _of_splines(arguments: Mapping[str, Any], action_dim: int) -> int:
    width = arguments.get("hidden_sizes", [256])[-1]
    return spline_parameters(action_dim, width, arguments.get("num_transforms", 2))


def _check_size(
    arguments: Mapping[str, Any], observation_dim: int, action_dim: int, where: str, besides: int = 0
) -> None:
    """Reject a network that would exhaust the memory; ``besides`` counts parameters behind its layers."""
    named = (arguments.get(key) for key in ("num_components", "num_experts", "num_options"))
    components = next((number for number in named if isinstance(number, int)), 1)
    first, last = observation_dim + arguments.get("latent_dim", 0), components * (2 * action_dim + 1)
    sizes = [first, *arguments.get("hidden_sizes", []), last]
    if besides + sum(a * b for a, b in zip(sizes, sizes[1:], strict=False)) > _MAX_PARAMETERS:
        raise RunError(f"{where}: the network would have more than {_MAX_PARAMETERS} parameters")
