"""The SAC update as a graph of tensors against the loss module, Adam and SoftUpdate that define it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from pmoe_lightning.estimators import (
    AbstractEstimator,
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Implicit,
    Marginalized,
    Pathwise,
    ScoreFunction,
)
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.losses import PMOESACLoss, SafeSACLoss
from pmoe_lightning.modules.actors import make_additive_moe_actor, make_gaussian_actor, make_mcp_actor, make_pmoe_actor
from pmoe_lightning.modules.critics import make_layer_norm_network, make_qvalue_network
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.modules.flow import make_flow_actor
from pmoe_lightning.modules.latent import make_latent_actor
from pmoe_lightning.safe.constraint import CostConstraint
from pmoe_lightning.updates import SACUpdate

OBSERVATION_DIM, A, B, TAU = 5, 2, 16, 0.05
LOW, HIGH = [-1.0, -2.0], [1.0, 3.0]
slow = pytest.mark.slow
ESTIMATORS: dict[str, Callable[[], AbstractEstimator]] = {
    "frequency": Frequency,
    "frequency-all-mixture": lambda: Frequency(backpropagate="all", log_prob="mixture", rank_by="soft_q"),
    "gumbel_softmax": lambda: GumbelSoftmax(final_temperature=0.1),
    "half_reparameterized": HalfReparameterized,
    "implicit": Implicit,
    "marginalized": Marginalized,
    "score_function": ScoreFunction,
}
ACTORS = {"additive_moe": make_additive_moe_actor, "gaussian": make_gaussian_actor, "mcp": make_mcp_actor}
#: Whose draws are asked for behind the network; a transform serves the flow alone.
ACTORS_WITH_HEADS = {"latent": make_latent_actor, "flow": make_flow_actor}

#: CrossQ's correction by the running statistics begins within the test.
CRITICS = {
    "plain": make_qvalue_network,
    "layer_norm": make_layer_norm_network,
    "crossq": partial(make_crossq_network, warm_up=12, momentum=0.8),
}


def make(
    make_actor=make_pmoe_actor,
    estimator: AbstractEstimator | None = None,
    *,
    fixed_alpha: bool = False,
    force: str | None = None,
    constraint: CostConstraint | None = None,
    critic: str = "plain",
):
    """A loss and its optimizer, the same at every call."""
    sizes = {"hidden_sizes": (12, 8)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = make_actor(OBSERVATION_DIM, LOW, HIGH, **sizes)
        critics = [CRITICS[critic](OBSERVATION_DIM, A, **sizes) for _ in range(2 if constraint is None else 4)]
        transform = None
        if force is not None:
            transform = make_hamiltonian_transform(OBSERVATION_DIM, A, force=force, step_size=0.2, learn_step_size=True)
    arguments = {"estimator": estimator or Frequency(), "action_transform": transform, "fixed_alpha": fixed_alpha}
    arguments |= {"target_entropy": -2.0, "alpha_init": 0.5}
    if constraint is None:
        loss = PMOESACLoss(actor, critics, **arguments)
    else:
        loss = SafeSACLoss(actor, critics[:2], critics[2:], constraint, **arguments)
    loss.make_value_estimator(gamma=0.9)
    acting = [*loss.actor_network_params.parameters(), *(() if transform is None else transform.parameters())]
    groups = [{"params": acting, "lr": 1e-3}]
    groups.append({"params": list(loss.qvalue_network_params.parameters()), "lr": 2e-3})
    if not fixed_alpha:
        groups.append({"params": [loss.log_alpha], "lr": 5e-3})
    if constraint is not None:
        groups.append({"params": list(loss.cost_network_params.parameters()), "lr": 2e-3})
        groups.append({"params": [loss.multiplier], "lr": 1e-2})
    return loss, torch.optim.Adam(groups, fused=True)


def minibatches(updates: int) -> TensorDict:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(updates, B, *shape, generator=generator)

    after = {"reward": normal(1), "terminated": normal(1) > 1, "truncated": normal(1) > 1}
    after |= {"observation": normal(OBSERVATION_DIM), "done": after["terminated"] | after["truncated"]}
    root = {"observation": normal(OBSERVATION_DIM), "action": normal(A).tanh()}
    after["cost"] = (normal(1) > 0).to(after["reward"].dtype)
    return TensorDict({**root, "next": TensorDict(after, [updates, B])}, [updates, B])


class Readable:
    """What ``SACUpdate`` must equal: loss module, one summed backward pass, ``torch.optim.Adam``, ``SoftUpdate``."""

    def __init__(self, loss: PMOESACLoss, optimizer: torch.optim.Adam, policy_delay: int = 1) -> None:
        self.loss, self.optimizer, self.policy_delay = loss, optimizer, policy_delay
        self.target = SoftUpdate(loss, tau=TAU) if loss.delay_qvalue else None

    def __call__(self, batch: TensorDict, first: int = 0) -> dict[str, torch.Tensor]:
        outs: dict[str, list[torch.Tensor]] = {}
        for i, minibatch in enumerate(batch.unbind(0), first + 1):
            out = self.loss.critic_losses(minibatch) if i % self.policy_delay else self.loss(minibatch)
            self.optimizer.zero_grad()
            sum(value for name, value in out.items() if name.startswith("loss_")).backward()
            self.optimizer.step()
            self.loss.take_statistics(out.pop("statistics", None))
            if self.target is not None:
                self.target.step()
            for name, value in out.items():
                outs.setdefault(name, []).append(value.detach())
        return {name: torch.stack(values) for name, values in outs.items()}


def assert_same(first, second) -> None:
    """Losses and optimizers agree: every tensor within 1e-9 of its largest entry."""
    for one, other in ((first[0].state_dict(), second[0].state_dict()), (flat(first[1]), flat(second[1]))):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                tolerance = 1e-9 * max(float(value.abs().max()), 1e-3)
                assert (other[name] - value).abs().max() <= tolerance, name


@pytest.fixture(autouse=True)
def double_precision():
    """Over 200 updates single precision alone would part two equal programs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flat(optimizer: torch.optim.Adam) -> dict[str, torch.Tensor]:
    return {f"{i}.{k}": value for i, state in optimizer.state_dict()["state"].items() for k, value in state.items()}


def reversed_entries(batch: TensorDict) -> TensorDict:
    """The same entries in the opposite order, within ``next`` too."""
    entries = {key: reversed_entries(value) if key == "next" else value for key, value in batch.items()}
    return TensorDict(dict(reversed(entries.items())), batch.batch_size)


@pytest.fixture
def traces_only(monkeypatch):
    """Programs stay what the compiler is given: bound to their arguments as compiled ones are, and made in seconds."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)


def run_both(make_pair, updates: int, *, compile: bool, policy_delay: int = 1) -> None:
    """The same numbers after every ten updates, draw for draw, without a second compilation."""
    (loss, optimizer), (other_loss, other_optimizer) = pairs = make_pair(), make_pair()
    readable = Readable(loss, optimizer, policy_delay)
    update = SACUpdate(other_loss, other_optimizer, tau=TAU, policy_delay=policy_delay, compile=compile)
    for start in range(0, updates, 10):
        loss.estimator.anneal(start / updates)
        other_loss.estimator.anneal(start / updates)
        batch = minibatches(updates)[start : start + 10]
        with torch.random.fork_rng():
            expected = readable(batch.clone(), start)
            drawn = torch.get_rng_state()
        metrics = update(batch, start)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert metrics.keys() == expected.keys() | {"gradient_norm"}
        for name, value in expected.items():
            tolerance = 1e-9 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(metrics[name], value, rtol=0, atol=tolerance, check_dtype=False)
        assert_same(*pairs)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_200_updates_equal_the_readable_form_for_every_estimator(name):
    run_both(lambda: make(make_pmoe_actor, ESTIMATORS[name]()), 200, compile=False)


@pytest.mark.parametrize("name", ACTORS)
def test_200_updates_equal_the_readable_form_for_every_actor(name):
    run_both(lambda: make(ACTORS[name], Pathwise()), 200, compile=False)


@pytest.mark.parametrize("name", ACTORS_WITH_HEADS)
def test_20_updates_equal_the_readable_form_for_an_actor_with_a_head(name):
    run_both(lambda: make(ACTORS_WITH_HEADS[name], Pathwise()), 20, compile=False)


@slow
@pytest.mark.parametrize("name", ACTORS_WITH_HEADS)
def test_20_compiled_updates_equal_the_readable_form_for_an_actor_with_a_head(name):
    run_both(lambda: make(ACTORS_WITH_HEADS[name], Pathwise()), 20, compile=True)


#: About the mean cost of the minibatches, so that the multiplier goes up and down.
CONSTRAINT = CostConstraint(cost_limit=0.5, gamma=0.8, multiplier_init=0.1)
BEYOND_PLAIN_SAC = [
    pytest.param("raw", None, id="raw"),
    pytest.param("gated", None, id="gated"),
    pytest.param(None, CONSTRAINT, id="safe", marks=slow),
    pytest.param("raw", CONSTRAINT, id="raw-safe", marks=slow),
]


@pytest.mark.parametrize(("force", "constraint"), BEYOND_PLAIN_SAC)
def test_200_updates_equal_the_readable_form_with_a_transform_or_a_constraint(force, constraint):
    run_both(lambda: make(force=force, constraint=constraint), 200, compile=False)


def test_20_updates_equal_the_readable_form_with_a_transform_under_a_constraint():
    run_both(lambda: make(force="gated", constraint=CONSTRAINT), 20, compile=False)


@pytest.mark.parametrize(
    ("critic", "policy_delay", "arguments"),
    [
        ("plain", 3, {}),
        ("layer_norm", 1, {"force": "raw"}),
        ("crossq", 3, {"force": "gated"}),
        ("crossq", 2, {"constraint": CONSTRAINT}),
    ],
    ids=["plain-delayed", "layer_norm-raw", "crossq-gated", "crossq-safe"],
)
def test_updates_equal_the_readable_form_with_other_critics(critic, policy_delay, arguments):
    run_both(lambda: make(critic=critic, **arguments), 40, compile=False, policy_delay=policy_delay)


@slow
@pytest.mark.parametrize("critic", ["crossq", "layer_norm"])
@pytest.mark.parametrize("name", [*ESTIMATORS, *ACTORS])
def test_200_compiled_updates_equal_the_readable_form_with_other_critics(name, critic):
    actor, estimator = (make_pmoe_actor, ESTIMATORS[name]) if name in ESTIMATORS else (ACTORS[name], Pathwise)
    run_both(lambda: make(actor, estimator(), critic=critic), 200, compile=True, policy_delay=3)


@slow
@pytest.mark.parametrize(("force", "constraint"), BEYOND_PLAIN_SAC)
def test_200_compiled_updates_of_crossq_with_a_transform_or_a_constraint(force, constraint):
    run_both(lambda: make(force=force, constraint=constraint, critic="crossq"), 200, compile=True, policy_delay=3)


OTHER_BATCHES = {
    "order": reversed_entries,
    "size": lambda batch: batch[:, :4],
    "type": lambda batch: batch.set(("next", "reward"), batch["next", "reward"].float()),
    "one entry more": lambda batch: batch.set(("next", "extra"), batch["next", "reward"] * 7),
}


@pytest.mark.usefixtures("traces_only")
@pytest.mark.parametrize("names", [["order", "size"], pytest.param([*OTHER_BATCHES], marks=slow)], ids=["some", "all"])
def test_a_program_belongs_to_names_shapes_and_types(names):
    """Batches of other kinds between two of the first kind: each gets the numbers of the readable form."""
    readable = Readable(*make(make_gaussian_actor, Pathwise()))
    update = SACUpdate(*make(make_gaussian_actor, Pathwise()), tau=TAU)
    for name in ("first", *names, "first again"):
        batch = OTHER_BATCHES.get(name, TensorDict.clone)(minibatches(2))
        with torch.random.fork_rng():
            expected = readable(batch.clone())
        metrics = update(batch)
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-6, atol=1e-9, check_dtype=False, msg=name)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("key", ["observation", "action", *(("next", name) for name in ("reward", "terminated"))])
def test_a_batch_without_an_entry_that_the_loss_reads_is_refused(key, compile):
    update = SACUpdate(*make(), tau=TAU, compile=compile)
    with pytest.raises(KeyError, match=f"the minibatches lack what PMOESACLoss reads: .*{key[-1]}"):
        update(minibatches(1).exclude(key))


def test_a_fixed_temperature_stays():
    run_both(lambda: make(fixed_alpha=True), 20, compile=False)


@slow
@pytest.mark.parametrize(("force", "constraint"), BEYOND_PLAIN_SAC)
def test_200_compiled_updates_equal_the_readable_form_with_a_transform_or_a_constraint(force, constraint):
    run_both(lambda: make(force=force, constraint=constraint), 200, compile=True)


@slow
@pytest.mark.parametrize("force", [None, "gated"])
@pytest.mark.parametrize("name", [*ESTIMATORS, *ACTORS])
def test_200_compiled_updates_equal_the_readable_form(name, force):
    actor, estimator = (make_pmoe_actor, ESTIMATORS[name]) if name in ESTIMATORS else (ACTORS[name], Pathwise)
    run_both(lambda: make(actor, estimator(), force=force), 200, compile=True)


def test_the_forms_can_take_turns_on_one_optimizer():
    """Also through a state dict, and wherever the switch falls: what they leave behind is the same."""
    reference, (loss, optimizer) = make(), make()
    with torch.random.fork_rng():
        Readable(*reference)(minibatches(15))
    Readable(loss, optimizer)(minibatches(15)[:5])
    SACUpdate(loss, optimizer, tau=TAU, compile=False)(minibatches(15)[5:8])
    resumed, resumed_optimizer = make()
    readable = Readable(resumed, resumed_optimizer)  # SoftUpdate sets the targets when it is made
    resumed.load_state_dict(loss.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    SACUpdate(resumed, resumed_optimizer, tau=TAU, compile=False)(minibatches(15)[8:10])
    readable(minibatches(15)[10:])
    assert_same(reference, (resumed, resumed_optimizer))
    dtypes = [{name: value.dtype for name, value in flat(o).items()} for o in (reference[1], resumed_optimizer)]
    assert dtypes[0] == dtypes[1]


def test_a_new_optimizer_gets_the_state_it_would_give_itself():
    (loss, optimizer), reference = make(), make()
    Readable(*reference)(minibatches(1))
    SACUpdate(loss, optimizer, tau=TAU, compile=False)(minibatches(1))
    expected, found = flat(reference[1]), flat(optimizer)
    assert {k: (v.dtype, v.shape) for k, v in expected.items()} == {k: (v.dtype, v.shape) for k, v in found.items()}


def test_one_component_is_a_gaussian():
    """PMOE's estimator at K = 1 takes the very updates of plain reparameterisation."""
    runs = []
    for estimator in (Frequency(), Pathwise()):
        loss, optimizer = make(make_gaussian_actor, estimator)
        torch.manual_seed(1)
        SACUpdate(loss, optimizer, tau=TAU, compile=False)(minibatches(20))
        runs.append((loss, optimizer))
    assert_same(*runs)


def test_bootstrapping_goes_on_after_truncation_alone():
    """Everything else in the batch being equal, truncation changes nothing and termination does."""
    values = []
    for flags in ((0, 0), (0, 1), (1, 0)):
        batch = minibatches(1)
        for name, flag in zip(("terminated", "truncated"), flags, strict=True):
            batch["next", name].fill_(flag)
        torch.manual_seed(1)
        values.append(float(SACUpdate(*make(), tau=TAU, compile=False)(batch)["loss_qvalue"]))
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda parameters: torch.optim.Adam(parameters, weight_decay=0.1), "Adam with weight_decay"),
        (lambda parameters: torch.optim.Adam(parameters, amsgrad=True), "Adam with amsgrad"),
        (torch.optim.SGD, "SGD"),
    ],
)
def test_another_optimizer_than_plain_adam_is_refused(optimizer, reason):
    loss, _ = make()
    with pytest.raises(ValueError, match=f"plain Adam, not of {reason}: use compile=false"):
        SACUpdate(loss, optimizer(loss.parameters()), tau=TAU)


def test_two_processes_take_the_step_of_their_mean_gradient(tmp_path):
    """Two processes with half of the critics' batch each: one step on the mean, and afterwards the same parameters."""
    torch.multiprocessing.spawn(step_together, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    gradients = [rank["gradient"] for rank in ranks]
    assert not torch.equal(*gradients)
    for name, value in ranks[0]["parameters"].items():
        assert torch.equal(value, ranks[1]["parameters"][name]), name
    # After one step of Adam the first moment is (1 - beta1) times the gradient that was stepped.
    torch.testing.assert_close(ranks[0]["moment"], 0.1 * (gradients[0] + gradients[1]) / 2)


def step_together(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    loss, optimizer = make()
    batch = minibatches(2)[rank : rank + 1]
    update = SACUpdate(loss, optimizer, tau=TAU, compile=False)
    torch.manual_seed(rank)
    out = loss(batch[0].clone())
    parameter = optimizer.param_groups[1]["params"][2]
    (gradient,) = torch.autograd.grad(out["loss_qvalue"], parameter)
    torch.manual_seed(rank)
    update(batch)
    result = {"gradient": gradient, "moment": optimizer.state[parameter]["exp_avg"]}
    torch.save(result | {"parameters": loss.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
