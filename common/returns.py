"""Discounted returns along a dataset's trajectories, and the risk of a return."""

import numpy as np
import torch


def trajectory_ends(data):
    """(N,) bool: True in a trajectory's last transition, which does not lead to the next row's observation."""
    leads_on = (data["next_observations"][:-1] == data["observations"][1:]).all(dim=-1).cpu().numpy()
    return np.append(~leads_on, True)


def reward_to_go(data, gamma):
    """Discounted returns along the data's trajectories, G_t = r_t + gamma mask_t G_{t+1}, cut off at each one's end: a
    float64 array (N,). The data are {observations, next_observations (N, D), rewards, masks (N,)} in order of time.
    """
    rewards, masks = (data[key].double().cpu().numpy() for key in ("rewards", "masks"))
    ends, returns, value = trajectory_ends(data), np.zeros_like(rewards), 0.0
    for i in reversed(range(len(rewards))):
        value = rewards[i] + gamma * masks[i] * (0.0 if ends[i] else value)
        returns[i] = value
    return returns


def cvar(returns, level):
    """Conditional value at risk, the mean of the lowest share `level` of R equally likely returns: (R, ...) -> (...).

    Exact for these R values: where level * R is no whole number, the last one counts in part.
    """
    count = level * len(returns)
    weights = (count - torch.arange(len(returns), device=returns.device)).clamp(0, 1) / count  # (R,)
    return (returns.movedim(0, -1).sort(dim=-1).values * weights).sum(dim=-1)
