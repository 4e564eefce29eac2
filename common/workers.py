"""Environments in worker processes: their start and end, and the requests that step them.

Nothing here imports torch, so that a worker (`python -m common.workers FD`) comes up in a second and stays small.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from common import ROOT, envs, num_cores, python_environment

# Environments per seed (a manipulation one takes 0.2 GB). A constant, since the last bits of a matrix product depend on
# how many rows it has: so the same policy acts the same on any number of cores.
EPISODES_AT_ONCE = 4


class Workers:
    """Worker processes with their environments; slot (s, p), the p-th environment of seed s, lives in one of them.

    Args:
        args: the run's arguments: the environment, and the number of processes.
        num_seeds, num_episodes: of an evaluation; no more environments are made than it can use.
        frame_stack, render: see `envs.make_env`.

    Attributes:
        slots: [(s, p)], all of them.
        max_episode_steps: an episode's most steps.
    """

    def __init__(self, args, num_seeds, num_episodes, frame_stack=1, render=False):
        self.slots = [(s, p) for s in range(num_seeds) for p in range(min(num_episodes, EPISODES_AT_ONCE))]
        num_workers = min(args.eval_workers or min(16, num_cores()), len(self.slots))
        self.where = {slot: i % num_workers for i, slot in enumerate(self.slots)}  # slot -> number of its process
        self.processes, self.connections = [], []
        weakref.finalize(self, end, self.processes, self.connections)  # when nothing uses them any more

        environment = python_environment()
        environment.setdefault("OMP_NUM_THREADS", "1")
        for _ in range(num_workers):
            connection, child = Pipe()
            command = [sys.executable, "-m", "common.workers", str(child.fileno())]
            # The process inherits what is blocked: it is not stopped before it can say that it ignores these signals.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[child.fileno()])
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.processes.append(process)
            self.connections.append(connection)
            child.close()
        options = args.env_id, args.success_timing, frame_stack, render
        requests = {worker: ("make", (self.slots[worker::num_workers], options)) for worker in range(num_workers)}
        self.max_episode_steps = self._exchange(requests)[0]

    def ask(self, kind, values):
        """Sends {(s, p): value} to the slots' workers in one request each; returns {(s, p): reply}.

        A worker that failed, or died, is a RuntimeError with its traceback, or exit code.

        Args:
            kind: "reset" (value: a seed; reply: the observation), "step" (an action; (observation, reward, terminated,
                truncated, success)) or "render" (None; a frame).
            values: {(s, p): value}.
        """
        requests = {}
        for slot, value in values.items():
            requests.setdefault(self.where[slot], (kind, {}))[1][slot] = value
        replies = self._exchange(requests)
        return {slot: replies[self.where[slot]][slot] for slot in values}

    def _exchange(self, requests):
        """Sends {worker: request}; returns {worker: reply}."""
        for worker, request in requests.items():
            with contextlib.suppress(OSError):  # the reason stands in its last reply, or in its exit code
                self.connections[worker].send(request)
        replies = {}
        for worker in requests:
            try:
                ok, replies[worker] = self.connections[worker].recv()
            except (EOFError, OSError):
                code = self.processes[worker].wait()
                died = f"environment worker {worker} died with exit code {code} (negative: killed by that signal)"
                raise RuntimeError(died) from None
            if not ok:
                raise RuntimeError(f"environment worker {worker} failed:\n{replies[worker]}")
        return replies


def end(processes, connections):
    """Ends worker processes; idle ones leave by themselves when their connection closes."""
    for connection in connections:
        connection.close()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()


def serve(connection):
    """The worker process: answers the requests of `Workers` until the other end closes.

    The first request is ("make", (slots, make_env's arguments)), replied with an episode's most steps. Every
    reply is (ok, value); a failure is replied as (False, traceback) and ends the worker.
    """
    ok = True
    with contextlib.suppress(EOFError, OSError):  # the other end has closed, in the middle of a request or between two
        while ok:
            kind, values = connection.recv()
            try:
                if kind == "make":
                    slots, options = values
                    made = {slot: (envs.make_env(*options), np.random.MT19937()) for slot in slots}
                    reply = made[slots[0]][0].spec.max_episode_steps
                else:
                    reply = {slot: _answer(made[slot], kind, value) for slot, value in values.items()}
            except BaseException:
                ok, reply = False, traceback.format_exc()
            connection.send((ok, reply))


def _answer(place, kind, value):
    """A slot's reply; `place` is (environment, its own generator), which becomes numpy's global one: mazes draw from
    that at a reset, and teleport mazes in each step.
    """
    env, generator = place
    np.random.set_bit_generator(generator)
    if kind == "reset":
        return envs.reset_env(env, value)[0]
    if kind == "render":
        return env.render()
    ob, reward, terminated, truncated, info = env.step(value)
    return ob, float(reward), bool(terminated), bool(truncated), float(info["success"])


if __name__ == "__main__":
    # Ctrl-C and schedulers signal the whole group; the main process saves first, and closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # past the renderers' destructors, which print errors when the interpreter is half gone
