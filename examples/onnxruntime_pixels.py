"""Drive a MuJoCo environment from pixels with an exported policy: mujoco, numpy and onnxruntime beside the environment.

    python -m pmoe_lightning.export checkpoint=<checkpoint, run id or models:/name@alias> output=policy.onnx
    python examples/onnxruntime_pixels.py policy.onnx [--episodes 20] [--seed 0]

Neither this package nor PyTorch is imported. The file's metadata say which environment that is, Gymnasium's or
dm_control's, and what is seen of it: pictures of which side, grey or coloured, how many, with shadows or without.
Episode i is seeded with seed + i, as ``evaluate`` seeds it.
"""

import argparse
import json
import os

os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported; egl needs no display

import mujoco
import numpy as np
import onnxruntime

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Suite:
    """A task of dm_control."""

    def __init__(self, task: str, action_repeat: int = 1, time_limit: float | None = None, **_: object) -> None:
        from dm_control import suite

        limit = {} if time_limit is None else {"time_limit": time_limit}
        self.env, self.repeat = suite.load(*task.split("-", 1), task_kwargs=limit), action_repeat
        self.model, self.data = self.env.physics.model.ptr, self.env.physics.data.ptr
        self.camera = 0 if self.model.ncam else mujoco.MjvCamera()

    def reset(self, seed: int) -> None:
        self.env.task.random.seed(seed)
        self.env.reset()

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        reward = 0.0
        for _ in range(self.repeat):
            step = self.env.step(action)
            reward += step.reward
            if step.last():
                break
        return reward, step.last()


class Gymnasium:
    """A MuJoCo environment of Gymnasium, seen through the camera "track" where there is one, else the free one."""

    def __init__(self, id: str, **arguments: object) -> None:
        import gymnasium

        self.env = gymnasium.make(id, render_mode="rgb_array", **arguments)
        world = self.env.unwrapped
        self.model, self.data = world.model, world.data
        self.camera = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if self.camera == -1:
            self.camera = mujoco.MjvCamera()
            mujoco.mjv_defaultFreeCamera(self.model, self.camera)
            for key, value in (world.mujoco_renderer.default_cam_config or {}).items():
                setattr(self.camera, key, value)

    def reset(self, seed: int) -> None:
        self.env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        _, reward, terminated, truncated, _ = self.env.step(action)
        return float(reward), terminated or truncated


class Camera:
    """The last pictures of an environment, bytes [S C, H, H]."""

    def __init__(self, env: Suite | Gymnasium, size: int, grey: bool = False, stack: int = 3, look: str = "default"):
        if look == "fast":
            env.model.vis.quality.offsamples = 0
        self.renderer, self.env, self.grey, self.stack = mujoco.Renderer(env.model, size, size), env, grey, stack
        if look == "fast":
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.pictures: list[np.ndarray] = []

    def look(self, begins: bool = False) -> np.ndarray:
        self.renderer.update_scene(self.env.data, self.env.camera)
        picture = self.renderer.render()
        picture = (picture @ LUMA + 0.5).astype(np.uint8)[None] if self.grey else picture.transpose(2, 0, 1)
        self.pictures = [picture] * self.stack if begins else [*self.pictures[1:], picture]
        return np.concatenate(self.pictures)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("policy", help="the file")
parser.add_argument("--episodes", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # more threads would wait for each other: the network is small
policy = onnxruntime.InferenceSession(arguments.policy, options, providers=["CPUExecutionProvider"])
facts = policy.get_modelmeta().custom_metadata_map
low, high = (np.array(json.loads(facts[f"action_{end}"]), np.float32) for end in ("low", "high"))
settings = json.loads(facts["env_kwargs"])
env = Suite(**settings) if facts["env_backend"] == "dm_control" else Gymnasium(facts["env"], **settings)
camera = Camera(env, **json.loads(facts["pixels"]))

returns = []
for episode in range(arguments.episodes):
    env.reset(arguments.seed + episode)
    pixels, total, done = camera.look(begins=True), 0.0, False
    while not done:
        (action,) = policy.run(["action"], {"pixels": pixels[None]})[0]
        reward, done = env.step(action.clip(low, high))
        pixels, total = camera.look(), total + reward
    returns.append(total)
camera.renderer.close()

error = np.std(returns, ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
print(f"return {np.mean(returns):.2f}, standard error {error:.2f}, {len(returns)} episodes of {facts['env']}")
