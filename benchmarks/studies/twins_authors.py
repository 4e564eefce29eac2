"""The authors' side of benchmarks/studies/twins.py: one of their agents, in their Python (JAX), answering requests.

twins.py starts it (`PYTHON twins_authors.py FD`) and sends (kind, arguments) through the connection FD; every reply is
(ok, value). It imports jax, numpy and the authors' checkout, and nothing of this project. Their package `agents` is
entered without its `__init__`, which imports every agent.
"""

import importlib
import importlib.metadata
import os
import pickle
import sys
import time
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

AGENTS = {  # method -> their file and class
    "floq": ("floq", "FloQAgent"),
    "value_flows": ("value_flows", "ValueFlowsAgent"),
    "q_flow": ("qflow", "QFlowAgent"),
}
RENAMED = {"critic/q": "critic/q_mean"}  # floq's name of what is called q_mean here


def load_agent(authors, method):
    """Their module of an agent and its class."""
    sys.path.insert(0, str(authors))
    package = types.ModuleType("agents")
    package.__path__ = [str(Path(authors) / "agents")]
    sys.modules["agents"] = package
    file, name = AGENTS[method]
    module = importlib.import_module(f"agents.{file}")
    return module, getattr(module, name)


class Server:
    """One method's agent; seeds come one after another, so that all of them share the compiled functions.

    Args:
        authors: their checkout.
        method: floq, value_flows or q_flow.
        config: settings that differ from their defaults, by their names.
        data: npz file of twins.export_data.
    """

    def __init__(self, authors, method, config, data):
        self.method, self.config = method, config
        self.module, self.agent_class = load_agent(authors, method)
        with np.load(data) as file:
            self.data = {name: file[name] for name in file.files}
        self.agent = self.template = self.make_agent(0)
        self.seed, self.step = 0, 0
        self.jitted = {}

    def make_agent(self, seed):
        """Their agent with their default configuration and the settings given."""
        config = self.module.get_config()
        for name, value in self.config.items():
            if name not in config:
                raise KeyError(f"{self.module.__file__} has no setting {name}")
            config[name] = tuple(value) if isinstance(value, list) else value
        low, high = float(self.data["rewards"].min()), float(self.data["rewards"].max())
        observations, actions = self.data["observations"][:1], self.data["actions"][:1]
        if self.method == "value_flows":
            example = {"observations": observations, "actions": actions, "min_reward": low, "max_reward": high}
            return self.agent_class.create(seed, example, config)
        if self.method == "floq":
            config["r_min"], config["r_max"] = low, high
        return self.agent_class.create(seed, observations, actions, config)

    def restore(self, arrays):
        """Puts weights, Adam's moments and the key into the agent, whose compiled functions stay."""
        self.agent = serialization.from_state_dict(self.template, arrays)

    def begin(self, seed, state=None):
        """Takes up a seed, from the file `state` if there is one; returns the number of its updates so far."""
        self.seed, self.step = seed, 0
        if state is None:
            self.restore(serialization.to_state_dict(self.make_agent(seed)))
        else:
            with open(state, "rb") as file:
                saved = pickle.load(file)
            self.step = saved["step"]
            self.restore(saved["agent"])
        return self.step

    def save(self, state):
        """Saves the seed's agent to the file `state`, whole or not at all."""
        arrays = jax.tree_util.tree_map(np.asarray, serialization.to_state_dict(self.agent))
        with open(f"{state}.part", "wb") as file:
            pickle.dump({"step": self.step, "agent": arrays}, file)
        os.replace(f"{state}.part", state)

    def batch(self, step):
        """The batch of an update, rows drawn uniformly with replacement as by theirs; a function of seed and step."""
        size = self.config["batch_size"]
        rows = np.random.default_rng([self.seed, step]).integers(len(self.data["rewards"]), size=size)
        return self.rows(rows)

    def rows(self, rows):
        """A batch of these rows of the data."""
        names = ("observations", "next_observations", "actions", "rewards", "masks")
        return {name: self.data[name][rows] for name in names}

    def train(self, updates):
        """Trains by some updates; returns the mean of each loss over them, and the learned values after them."""
        sums = None
        for _ in range(updates):
            self.agent, info = self.agent.update(self.batch(self.step))
            sums = mean_losses(info) if sums is None else add_losses(sums, info)
            self.step += 1
        means = {RENAMED.get(name, name): float(value) / updates for name, value in sums.items()}
        return means | self.learned_values()

    def learned_values(self):
        """Mean learned values of the fixed pairs: {quantity: number}."""
        rows = self.data["probe_rows"]
        observations, actions, noise = (
            self.data["observations"][rows],
            self.data["actions"][rows],
            self.data["probe_normal"],
        )
        agent, network = self.agent, self.agent.network.select
        if self.method == "value_flows":
            horizon = 1 / (1 - agent.config["discount"])
            q = [
                noise + network(f"critic_flow{e}")(noise, jnp.zeros_like(noise), observations, actions) for e in (1, 2)
            ]
            q = jnp.clip(jnp.stack(q), agent.config["min_reward"] * horizon, agent.config["max_reward"] * horizon)
            return {"values/q": float(q.mean())}
        values = {"values/q": float(network("critic")(observations, actions=actions).mean())}
        if self.method == "floq":
            flow_q = agent.compute_current_flow_returns(observations, actions, noise_ratios=self.data["probe_uniform"])
            values["values/flow"] = float(flow_q.mean())
        return values

    def take(self, states):
        """Takes the agents of these files, one per seed, for `act`."""
        self.actors = []
        for state in states:
            self.begin(0, state)
            self.actors.append(self.agent)

    def act(self, observations, keys):
        """Actions of the taken agents: observations (S, P, D), keys (S, P, 2) of their random numbers -> (S, P, A)."""
        if "act" not in self.jitted:  # weights are an argument: a constant would be compiled in anew at each evaluation
            one = lambda agent, ob, key: agent.sample_actions(observations=ob, temperature=0, seed=key)
            self.jitted["act"] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
        keys = keys.astype(np.uint32)
        actions = [self.jitted["act"](*inputs) for inputs in zip(self.actors, observations, keys)]
        return np.clip(np.stack([np.asarray(action) for action in actions]), -1, 1)

    def time(self, updates):
        """Seconds of some updates, and seconds of processor time over all threads."""
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(updates):
            self.agent, info = self.agent.update(self.batch(self.step))
            self.step += 1
        jax.block_until_ready((self.agent, info))
        return time.perf_counter() - start, time.process_time() - processor

    def weights(self):
        """{name of a weight, parts joined by "/": array}, and the agent's key as "rng"."""
        flat = jax.tree_util.tree_flatten_with_path(self.agent.network.params)[0]
        named = {"/".join(str(part.key) for part in path): np.asarray(value) for path, value in flat}
        return named | {"rng": np.asarray(self.agent.rng)}

    def set_weights(self, weights):
        """Puts in another agent's weights of `weights` and its key; Adam begins anew."""
        name = lambda path: "/".join(str(part.key) for part in path)
        put = lambda path, value: jnp.asarray(weights[name(path)])
        network = self.template.network
        params = jax.tree_util.tree_map_with_path(put, network.params)
        network = network.replace(params=params, opt_state=network.tx.init(params))
        self.agent = self.agent.replace(network=network, rng=jnp.asarray(weights["rng"]))

    def parity_update(self, rows, with_draws=True):
        """One update with the data's rows of these numbers (B,).

        Returns:
            Its losses {name: number}, and every random number that it used, under our names {name: (rows, ...)}.
        """
        draws = DRAWS[self.method](self.agent.rng, self.agent.config) if with_draws else {}
        self.agent, info = self.agent.update(self.rows(rows))
        losses = {RENAMED.get(name, name): float(value) for name, value in mean_losses(info).items()}
        return losses, {name: np.asarray(value) for name, value in draws.items()}

    def permute_noise(self, order):
        """From now on, all random numbers of an update come in this order of the batch's rows, as the caller's rows do.

        An update is then the same but for the order of its sums. Must precede the first update.
        """
        B = len(order)

        def permuted(draw):
            def drawn(key, shape=(), *rest, **more):
                values = draw(key, shape, *rest, **more)
                copies = shape[0] // B if shape and shape[0] % B == 0 else 0
                return values[(order[:, None] * copies + np.arange(copies)).reshape(-1)] if copies else values

            return drawn

        jax.random.normal, jax.random.uniform = permuted(jax.random.normal), permuted(jax.random.uniform)

    def versions(self):
        """Versions of what computes."""
        names = ("jax", "jaxlib", "flax", "optax", "distrax", "ml_collections", "numpy")
        return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names}


@jax.jit
def mean_losses(info):
    """Each loss and statistic, averaged where their agent gives one per row."""
    return {name: jnp.mean(value) for name, value in info.items() if not name.startswith("grad/")}


@jax.jit
def add_losses(sums, info):
    """The sums with one update's losses added."""
    return {name: sums[name] + jnp.mean(info[name]) for name in sums}


# --- The random numbers that an update of theirs draws from its key, under our names ---


def normal(key, *shape):
    """Standard normal numbers, as theirs."""
    return jax.random.normal(key, shape)


def uniform(key, *shape):
    """Uniform numbers in [0, 1), as theirs."""
    return jax.random.uniform(key, shape)


def floq_draws(key, config):
    """Of an update of floq."""
    rows, A, B = config["batch_size"] * config["noise_samples"], config["action_dim"], config["batch_size"]
    _, actor, critic = jax.random.split(jax.random.split(key)[1], 3)
    critic, sample = jax.random.split(critic)
    draws = {"next_action": normal(jax.random.split(sample)[0], rows, A)}
    for name in ("next_start", "start", "time"):
        critic, one = jax.random.split(critic)
        draws[name] = uniform(one, rows, 1)
    actor, x, t = jax.random.split(actor, 3)
    distill = jax.random.split(actor)[1]
    return draws | {"bc_action": normal(x, B, A), "bc_time": uniform(t, B, 1), "distill": normal(distill, B, A)}


def value_flows_draws(key, config):
    """Of an update of Value Flows."""
    B, A, C = config["batch_size"], config["action_dim"], config["num_samples"]
    _, critic, actor = jax.random.split(jax.random.split(key)[1], 3)
    _, sample, noise, t, _, confidence = jax.random.split(critic, 6)
    candidates, q = jax.random.split(sample)
    draws = {"next_action_candidates": normal(candidates, B, C, A), "next_q": normal(q, B, C, 1)}
    draws |= {"confidence": normal(confidence, B, 1), "return": normal(noise, B, 1), "time": uniform(t, B, 1)}
    _, x, t, distill, q = jax.random.split(actor, 5)
    draws |= {"bc_action": normal(x, B, A), "bc_time": uniform(t, B, 1), "distill": normal(distill, B, A)}
    return draws | {"actor_q": normal(q, B, 1)}


def q_flow_draws(key, config):
    """Of an update of Q-Flow."""
    B, A = config["batch_size"], config["action_dim"]
    _, actor, critic = jax.random.split(jax.random.split(key)[1], 3)
    _, sample, x, t = jax.random.split(critic, 4)
    draws = {"next_action": normal(jax.random.split(sample)[0], B, A)}
    draws |= {"value_action": normal(x, B, A), "value_time": uniform(t, B, 1)}
    _, x, t = jax.random.split(actor, 3)
    return draws | {"policy_action": normal(x, B, A), "policy_time": uniform(t, B, 1)}


DRAWS = {"floq": floq_draws, "value_flows": value_flows_draws, "q_flow": q_flow_draws}


def serve(connection):
    """Answers requests until the other end closes; the first one, "make", has the Server's arguments."""
    server = None
    while True:
        try:
            kind, arguments = connection.recv()
        except EOFError:
            return
        try:
            if kind == "make":
                server, reply = Server(**arguments), None
            else:
                reply = getattr(server, kind)(**arguments)
            connection.send((True, reply))
        except BaseException:
            connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # compiled functions outlive the process
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    serve(Connection(int(sys.argv[1])))
