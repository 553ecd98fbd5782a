"""Drive a Gymnasium environment with an exported policy: gymnasium, numpy and onnxruntime, and nothing else.

    python -m pmoe_lightning.export checkpoint=<checkpoint, run id or models:/name@alias> output=policy.onnx
    python examples/onnxruntime_loop.py policy.onnx [--episodes 20] [--seed 0]

Neither this package nor PyTorch is imported. Episode i is seeded with seed + i, as ``evaluate`` seeds it. The file's
metadata says which environment that is; observations are given as the environment returns them.
"""

import argparse
import json

import gymnasium
import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("policy", help="the file")
parser.add_argument("--episodes", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # more threads would wait for each other: the network is small
policy = onnxruntime.InferenceSession(arguments.policy, options, providers=["CPUExecutionProvider"])
facts = policy.get_modelmeta().custom_metadata_map
outputs = [output.name for output in policy.get_outputs()]
# A policy with memory reads what it wrote a step before; an episode begins without an option.
memory = [entry.name for entry in policy.get_inputs() if entry.name != "observation"]

env = gymnasium.make(facts["env"], **json.loads(facts["env_kwargs"]))
returns = []
for episode in range(arguments.episodes):
    observation, _ = env.reset(seed=arguments.seed + episode)
    remembered = {name: np.full((1, 1), -1, np.int64) for name in memory}
    total, done = 0.0, False
    while not done:
        row = np.asarray(observation, dtype=np.float32).reshape(1, -1)
        if not np.isfinite(row).all():
            raise SystemExit("the observation is not finite: stop the machine")
        acted = dict(zip(outputs, policy.run(None, {"observation": row, **remembered}), strict=True))
        remembered = {name: acted[name.removesuffix("_previous")] for name in memory}
        action = acted["action"][0].clip(env.action_space.low, env.action_space.high)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, done = total + float(reward), terminated or truncated
    returns.append(total)
env.close()

error = np.std(returns, ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
print(f"return {np.mean(returns):.2f}, standard error {error:.2f}, {len(returns)} episodes of {facts['env']}")
