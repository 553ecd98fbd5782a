"""A zoo of strangers' environments: what other people keep in theirs, and where.

Each observes what it keeps, so that a state that was not put back shows. ``EXACT`` are to step on exactly after a
restore, ``REFUSED`` are not to be captured, each with the part that is named.
"""

from __future__ import annotations

import enum
import itertools
import random
import socket
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.spaces import Box, Dict
from PIL import _imaging  # what C keeps is not seen, in PyBullet whole simulators

DRAWS = np.random.default_rng(5)
new_picture = _imaging.new
TABLE = {"gain": [1.0, 2.0], "offset": np.zeros(2)}
STEPS = 0
HELPERS = types.ModuleType("helpers")
sys.modules["zoo_helpers"] = HELPERS
HELPERS.__file__, HELPERS.noise, HELPERS.draw = __file__, np.random.default_rng(6), lambda: DRAWS.normal()


class Stranger(gymnasium.Env):
    """Episodes of 7 to 30 steps; a subclass says what it keeps and how it changes in a step."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self.made()

    def made(self) -> None:
        """What the constructor keeps."""

    def began(self) -> None:
        """What a reset does."""

    def moved(self, action: np.ndarray) -> float:
        """What a step does; the number is observed."""
        return 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.limit, self.total = 0, int(self.np_random.integers(7, 30)), 0.0
        self.began()
        return np.array([self.total, self.limit], np.float64), {}

    def step(self, action):
        self.steps += 1
        value = float(self.moved(action))
        self.total = 0.5 * self.total + value
        return np.array([self.total, value], np.float64), value, False, self.steps >= self.limit, {}


class Generator(Stranger):
    def made(self):
        self.noise = np.random.default_rng(1)

    def moved(self, action):
        return self.noise.normal()


class SharedGenerator(Stranger):
    def began(self):
        self.noise = self.np_random

    def moved(self, action):
        return self.noise.normal() + self.np_random.normal()


class SpawnedGenerators(Stranger):
    def began(self):
        self.noises = self.np_random.spawn(2)

    def moved(self, action):
        if self.steps % 5 == 0:
            self.noises += self.noises[0].spawn(1)
        return sum(noise.normal() for noise in self.noises)


class OtherBitGenerators(Stranger):
    def made(self):
        kinds = (np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
        self.noises = [np.random.Generator(kind(3)) for kind in kinds]
        self.same = np.random.Generator(self.noises[0].bit_generator)

    def moved(self, action):
        return sum(noise.random(dtype=np.float32) for noise in self.noises) + self.same.normal()


class RandomState(Stranger):
    def made(self):
        self.noise = np.random.RandomState(1)

    def moved(self, action):
        return self.noise.randn()


class PythonRandom(Stranger):
    def made(self):
        self.noise = random.Random(1)

    def moved(self, action):
        return self.noise.gauss(0, 1)


class TorchGenerator(Stranger):
    def made(self):
        self.noise = torch.Generator().manual_seed(1)

    def moved(self, action):
        return torch.randn((), generator=self.noise).item()


class GlobalGenerators(Stranger):
    def moved(self, action):
        return np.random.rand() + random.random() + torch.rand(()).item()


class ModuleGenerator(Stranger):
    def moved(self, action):
        return DRAWS.normal()


class ModuleData(Stranger):
    def moved(self, action):
        global STEPS
        STEPS += 1
        TABLE["gain"].append(TABLE["gain"].pop(0))
        TABLE["offset"] += action
        return TABLE["gain"][0] + TABLE["offset"].sum() + STEPS


def _draw_of_the_module():
    return DRAWS.random()


class CalledGenerator(Stranger):
    def moved(self, action):
        return _draw_of_the_module()


class OtherModule(Stranger):
    def moved(self, action):
        return HELPERS.noise.normal() + HELPERS.draw()


class Counted(type):
    """A metaclass that keeps something."""

    made = 0


class Tally:
    """A class of which no instance is kept, but something in it."""

    drawn = 0

    class Inner:
        marks = []

    @classmethod
    def draw(cls):
        cls.drawn += 1
        return cls.drawn


class OtherTally(Tally):
    pass


class OtherClasses(Stranger, metaclass=Counted):
    """What is kept in classes that no attribute leads to."""

    def moved(self, action):
        Counted.made += 1
        OtherTally.Inner.marks.append(1)
        return OtherTally.draw() + Tally.draw() + type(type(self)).made + len(Tally.Inner.marks)


class LocalImport(Stranger):
    """Imports where it needs something."""

    def moved(self, action):
        import zoo_helpers
        from zoo_helpers import noise

        zoo_helpers.count = getattr(zoo_helpers, "count", 0) + 1
        return noise.random() + zoo_helpers.count


class ReadOnly(Stranger):
    def made(self):
        self.goal, self.state = np.arange(3.0), np.zeros(2)
        self.view = self.state[1:]
        self.goal.flags.writeable = self.view.flags.writeable = False

    def moved(self, action):
        self.state += action
        return self.view.sum() + self.goal.flags.writeable + self.view.flags.writeable


class Constants(Stranger):
    """What cannot change, or does not, beside the class and in its module."""

    colour, kinds, table, root = "red", {1, 2}, frozenset("abc"), Path(".")

    def moved(self, action):
        return (
            len(self.kinds | self.table) + (Colour.RED in COLOURS) + len(self.root.parts) + (self.steps in {7, 8, "x"})
        )


class SpaceGenerator(Stranger):
    def __init__(self):
        self.goals = Dict({"goal": Box(-1.0, 1.0, (2,), np.float64, seed=3)})
        super().__init__()

    def moved(self, action):
        return self.goals.sample()["goal"].sum()


class InnerEnvironment(Stranger):
    def made(self):
        self.world = gymnasium.make("Pendulum-v1")

    def began(self):
        self.world.reset(seed=int(self.np_random.integers(1000)))

    def moved(self, action):
        observation, reward, *_ = self.world.step(2 * action[:1])
        return observation.sum() + reward


class InnerEnvironments(Stranger):
    def made(self):
        self.worlds = [gymnasium.make("Hopper-v5"), gymnasium.make("Pendulum-v1"), Generator()]

    def began(self):
        for world in self.worlds:
            world.reset(seed=3)
        self.current = self.worlds[int(self.np_random.integers(3))]

    def moved(self, action):
        return sum(world.step(np.resize(action, world.action_space.shape))[0].sum() for world in self.worlds) + (
            self.worlds.index(self.current)
        )


class RenderingNames(Stranger):
    def made(self):
        self.clock, self.data, self.model, self.screen, self.surf, self.viewer = 0, {}, [0.0], 0.0, 1, "a"

    def moved(self, action):
        self.clock += 1
        self.data["last"] = self.data.get("last", 0.0) + float(action[0])
        self.model[0] += 0.5
        self.screen, self.surf, self.viewer = self.screen - 1, -self.surf, self.viewer + "b"
        return self.clock + self.data["last"] + self.model[0] + self.screen + self.surf + len(self.viewer)


class PlainValues(Stranger):
    def made(self):
        self.none, self.flag, self.text, self.bytes, self.memory = None, False, "\ud800\0é", b"\0\xff", bytearray(b"ab")
        self.big, self.complex, self.nan, self.zero = 3**400, 1 + 2j, float("nan"), -0.0
        self.recent, self.by_number, self.by_place = deque([1.0], maxlen=3), {1: 2.0}, {(0, "x"): {None: 1}}
        self.single, self.half, self.true = np.float32(0.1), np.float16(0.3), np.bool_(True)
        self.when, self.kind, self.squash, self.element = (
            np.datetime64("2020-01-01"),
            np.float32,
            np.tanh,
            np.dtype("f4"),
        )

    def moved(self, action):
        self.flag, self.none = not self.flag, 1 if self.none is None else None
        self.recent.append(float(action[0]))
        self.memory.append(self.steps)
        self.big += 2**260
        self.complex *= 1j
        self.by_number[self.steps] = self.by_number.get(self.steps, 0) + 1
        self.by_place[(self.steps, "y")] = {None: self.steps}
        self.single = self.single * np.float32(1.01)
        self.when += np.timedelta64(1, "D")
        numbers = [sum(self.recent), sum(self.memory), self.big % 1009, self.complex.imag, len(self.by_number)]
        numbers += [self.single, list(self.by_place)[-1][0], self.when.astype(int), self.squash(self.half), self.flag]
        return float(sum(map(float, numbers)) + self.kind(0.1) + np.copysign(1, self.zero) + (self.none or 0))


class Arrays(Stranger):
    def made(self):
        self.columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        self.turned = np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2) + 0
        self.table = np.zeros(3, [("x", "f8"), ("n", "i4"), ("s", "U2")])
        self.swapped, self.long = np.ones(2, ">f8"), np.ones(2, np.longdouble)
        self.empty, self.scalar, self.words = np.empty((0, 3)), np.array(1.0), np.array(["a", "bc"])
        self.constant = np.broadcast_to(np.float64(2.0), (3,))

    def moved(self, action):
        self.columns += action[0]
        self.turned *= 1 + 0.01 * action[1]
        self.table["n"][self.steps % 3] += 1
        self.swapped += 1
        self.long /= 3
        self.scalar += 0.5
        self.words[0] = str(self.steps)
        numbers = [self.columns.ravel("K") @ np.arange(6), self.turned.sum(), self.table["n"] @ [1, 2, 3]]
        return (
            sum(numbers) + self.swapped[1] + float(self.long[0]) + self.scalar + int(self.words[0]) + self.empty.sum()
        )


class Views(Stranger):
    def made(self):
        self.state = np.zeros(6)
        self.position, self.velocity, self.reversed = self.state[:3], self.state[3:], self.state[::-2]
        self.square = self.state.reshape(2, 3).T

    def moved(self, action):
        self.velocity[:2] += action
        self.position += 0.1 * self.velocity
        self.square[2, 1] += 1
        return self.state @ np.arange(6) + self.reversed @ [1, 10, 100]


class Aliases(Stranger):
    def made(self):
        self.here = self.there = np.zeros(2)
        self.path, self.node = [], {"value": 0.0}
        self.node["self"], self.paths = self.node, [self.path, self.path]

    def moved(self, action):
        self.here += action
        self.path.append(self.steps)
        self.node["self"]["value"] += 1
        return self.there.sum() + len(self.paths[1]) + self.node["self"]["self"]["value"]


class DistinctAfterAll(Stranger):
    def made(self):
        self.here = self.there = np.zeros(2)

    def began(self):
        self.here = np.ones(2)

    def moved(self, action):
        self.here += action
        return self.here.sum() + 10 * self.there.sum()


class Slots(Stranger):
    __slots__ = ("__hidden", "unset")

    def made(self):
        self.__hidden = 0

    def moved(self, action):
        self.__hidden += 1
        self.unset = getattr(self, "unset", 0) + 2
        return self.__hidden + self.unset


class Comes(Stranger):
    """Attributes that come and go."""

    def made(self):
        self.first = 1

    def moved(self, action):
        if hasattr(self, "first"):
            del self.first
        self.later = getattr(self, "later", 0) + 1
        return self.later + hasattr(self, "first")


class ClassAttributes(Stranger):
    count, history, noise = 0, [], np.random.default_rng(2)

    def moved(self, action):
        type(self).count += 1
        self.history.append(self.count)
        return self.count + len(self.history) + self.noise.normal()


class Property(Stranger):
    def made(self):
        self._heat = 1.0

    @property
    def heat(self):
        return self._heat

    @heat.setter
    def heat(self, value):
        self._heat = value

    def moved(self, action):
        self.heat += float(action[0])
        return self.heat


def _counter(start):
    count, marks = start, []

    def step(by=1, *, cache={}):  # noqa: B006
        nonlocal count
        count += by
        marks.append(count)
        cache[count] = len(cache)
        step.calls += 1
        return count + len(marks) + len(cache) + step.calls

    step.calls = 0
    return step


class Closure(Stranger):
    def made(self):
        self.counters = {"a": _counter(0), "b": _counter(5)}
        self.gain = lambda x: 3 * x
        self.act = self.gently

    def gently(self, x):
        return 0.1 * x + self.steps

    def roughly(self, x):
        return 10 * x - self.steps

    def moved(self, action):
        self.act = self.roughly if self.steps % 2 else self.gently
        return self.counters["a"]() + self.counters["b"](2) + self.gain(self.steps) + self.act(action[0])


class Offers(Stranger):
    """Keeps what cannot be captured, and says itself what its state is."""

    def made(self):
        self.lock, self.seen, self.noise = threading.Lock(), {1, 2}, np.random.default_rng(0)

    def get_state(self):
        times = {"steps": self.steps, "limit": self.limit, "total": self.total}
        return {"seen": sorted(self.seen), "noise": self.noise, "times": times}

    def set_state(self, state):
        self.seen, self.noise = set(state["seen"]), state["noise"]
        vars(self).update(state["times"])

    def moved(self, action):
        self.seen.add(self.steps)
        return len(self.seen) + self.noise.normal() + self.np_random.normal()


class OffersAround(gymnasium.Wrapper):
    """A wrapper that offers its own part: the environment inside is captured as ever."""

    def __init__(self):
        super().__init__(Generator())
        self.lock, self.count = threading.Lock(), 0

    def get_state(self):
        return self.count

    def set_state(self, state):
        self.count = state

    def step(self, action):
        self.count += 1
        observation, *others = self.env.step(action)
        return observation + self.count, *others


class DictObservation(Stranger):
    """Its observations are no vector."""

    observation_space = Dict({"b": Box(-9, 9, (1,), np.float64), "a": Box(-9, 9, (1,), np.float64)})

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return {"b": observation[:1], "a": observation[1:]}, info

    def step(self, action):
        observation, *others = super().step(action)
        return {"b": observation[:1], "a": observation[1:]}, *others

    def moved(self, action):
        return self.np_random.normal()


class RandomisedCheetah(HalfCheetahEnv):
    """Draws masses, friction, gravity, damping and time step anew at each reset."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.model.body_mass[1:] *= self.np_random.uniform(0.8, 1.2)
        self.model.geom_friction[:] *= self.np_random.uniform(0.8, 1.2)
        self.model.opt.gravity[2] = self.np_random.uniform(-12, -8)
        self.model.opt.timestep = 0.01 * self.np_random.uniform(0.8, 1.2)
        self.model.dof_damping[:] *= self.np_random.uniform(0.9, 1.1)
        mujoco.mj_setConst(self.model, self.data)
        return observation, info


class ContactsFirst(HopperEnv):
    """Looks at the contacts before it simulates."""

    def step(self, action):
        contact = self.data.contact
        seen = float(contact.dist.sum() + contact.pos.sum() + self.data.ncon + self.data.qfrc_constraint.sum())
        observation, *others = super().step(action)
        observation[0] += seen
        return observation, *others


CART = """<mujoco><option integrator="RK4"/><worldbody><body name="cart"><joint name="x" type="slide" axis="1 0 0"/>
<geom size="0.1" mass="1"/>
<body pos="0 0 0.5"><joint name="h" type="hinge" axis="0 1 0"/><geom size="0.1"/></body></body>
</worldbody><actuator><motor joint="x" gear="3"/><motor joint="h"/></actuator></mujoco>"""


class OwnMujoco(Stranger):
    """MuJoCo without Gymnasium's class, under names of its own; the model is mutated through the data."""

    def made(self):
        self.physics = {"sim": mujoco.MjData(mujoco.MjModel.from_xml_string(CART))}

    def began(self):
        sim = self.physics["sim"]
        mujoco.mj_resetData(sim.model, sim)
        sim.model.body_mass[1] = self.np_random.uniform(1, 3)
        sim.qpos[:] = self.np_random.normal(size=2)

    def moved(self, action):
        sim = self.physics["sim"]
        sim.ctrl[:] = action
        mujoco.mj_step(sim.model, sim)
        return sim.qpos.sum() + sim.qvel.sum()


class Mode(enum.IntEnum):
    WALK = 1
    RUN = 2


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Goal:
    x: float = 0.0


class Text(str):
    pass


class Number(int):
    pass


class Pose(np.ndarray):
    pass


class Chaotic(random.Random):
    pass


def keeping(name: str, make):
    """An environment that keeps one thing, which it does not show: what is kept is to be refused by its type."""
    return type(name, (Stranger,), {"made": lambda self: vars(self).update(kept=make()), "__module__": __name__})


_array_of_objects = partial(np.array, [{}, None], dtype=object)


def _tuple_that_holds_itself():
    inner: list = []
    inner.append((inner,))
    return inner[0]


def _deep():
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


class _WithMemory(Stranger, list):
    pass


class WrongOffer(Stranger):
    def get_state(self):
        raise RuntimeError("no state\nnow")

    def set_state(self, state):
        pass


class OffersTooMuch(Stranger):
    def get_state(self):
        return {"lock": threading.Lock()}

    def set_state(self, state):
        pass


class ModuleLock(Stranger):
    def moved(self, action):
        with LOCK:
            return 0.0


class ForeignModule(Stranger):
    def moved(self, action):
        return float(_imaging.new("L", (1, 1)).getpixel((0, 0)))


class ForeignFunction(Stranger):
    def moved(self, action):
        return float(new_picture("L", (1, 1)).getpixel((0, 0)))


class ForeignImport(Stranger):
    def moved(self, action):
        import PIL._imaging as imaging

        return float(imaging.new("L", (1, 1)).getpixel((0, 0)))


class ForeignOfClass(Stranger):
    imaging = _imaging


LOCK, COLOURS = threading.Lock(), frozenset({Colour.RED})

EXACT = [Generator, SharedGenerator, SpawnedGenerators, OtherBitGenerators, RandomState, PythonRandom, TorchGenerator]
EXACT += [GlobalGenerators, ModuleGenerator, ModuleData, CalledGenerator, SpaceGenerator, InnerEnvironment]
EXACT += [InnerEnvironments, RenderingNames, PlainValues, Arrays, Views, Aliases, DistinctAfterAll, Slots, Comes]
EXACT += [ClassAttributes, Property, Closure, Offers, OffersAround, DictObservation, RandomisedCheetah, ContactsFirst]
EXACT += [OwnMujoco, OtherModule, OtherClasses, LocalImport, ReadOnly, Constants]

KEPT = {
    "IntEnum": lambda: Mode.RUN,
    "Enum": lambda: Colour.RED,
    "Dataclass": Goal,
    "Set": lambda: {1, 2},
    "FrozenSet": lambda: frozenset("ab"),
    "StrSubclass": lambda: Text("a"),
    "IntSubclass": lambda: Number(3),
    "DictSubclass": lambda: OrderedDict(a=1),
    "DefaultDict": lambda: defaultdict(list),
    "ArraySubclass": lambda: np.zeros(2).view(Pose),
    "MaskedArray": lambda: np.ma.array([1, 2]),
    "ObjectArray": _array_of_objects,
    "TorchMemory": lambda: torch.zeros(3).numpy(),
    "Tensor": lambda: torch.zeros(3),
    "GeneratorSubclass": lambda: Chaotic(3),
    "SystemRandom": random.SystemRandom,
    "GlobalRandom": lambda: random._inst,
    "GlobalRandomState": lambda: np.random.mtrand._rand,
    "HugeInteger": lambda: 10**1000,
    "Socket": socket.socket,
    "File": lambda: Path(__file__).open(),  # noqa: SIM115
    "Lock": threading.Lock,
    "Thread": threading.Thread,
    "Iterator": lambda: itertools.count(),
    "Coroutine": lambda: (x for x in [1, 2]),
    "BuiltinMethod": lambda: random.Random(0).random,
    "Partial": lambda: partial(print, 1),
    "Object": object,
    "Module": lambda: torch.nn.Linear(1, 1),
    "Deep": _deep,
    "Circular": _tuple_that_holds_itself,
    "InADict": lambda: {"a": [1, {"b": Mode.RUN}]},
    "Spec": mujoco.MjSpec,
    "MujocoMemory": lambda: mujoco.MjData(mujoco.MjModel.from_xml_string(CART)).qpos,
}
KEEPERS = {name: keeping(name, make) for name, make in KEPT.items()}
REFUSED = [(kind, "kept") for kind in KEEPERS.values()]
REFUSED += [(_WithMemory, "_WithMemory"), (WrongOffer, "get_state()"), (OffersTooMuch, "get_state()")]
REFUSED += [(ModuleLock, "LOCK"), (ForeignModule, "global _imaging"), (ForeignFunction, "global new_picture")]
REFUSED += [(ForeignImport, "import PIL._imaging"), (ForeignOfClass, "imaging")]

for _kind in (*EXACT, *(kind for kind, _ in REFUSED)):
    _length = None if issubclass(_kind, Stranger) else 20
    gymnasium.register(f"{_kind.__name__}-v0", _kind, max_episode_steps=_length)
