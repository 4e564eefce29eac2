"""Discounted returns along a dataset's trajectories."""

import numpy as np


def trajectory_ends(data):
    """(N,) bool: True in a trajectory's last transition, which does not lead to the next row's observation."""
    leads_on = (data["next_observations"][:-1] == data["observations"][1:]).all(dim=-1).cpu().numpy()
    return np.append(~leads_on, True)


def reward_to_go(data, gamma):
    """Discounted returns along the data's trajectories, G_t = r_t + gamma mask_t G_{t+1}, cut off at each one's end.

    Returns them and the discount of what is cut off (0 where a success follows): (N,) arrays of float64.

    Args:
        data: transitions {observations, next_observations (N, D), rewards, masks (N,)} in order of time.
        gamma: discount factor.
    """
    rewards, masks = (data[key].double().cpu().numpy() for key in ("rewards", "masks"))
    ends = trajectory_ends(data)
    returns, cut_off = np.zeros_like(rewards), np.zeros_like(rewards)
    value, discount = 0.0, 1.0
    for i in reversed(range(len(rewards))):
        if ends[i]:
            value, discount = 0.0, 1.0
        value = rewards[i] + gamma * masks[i] * value
        discount *= gamma * masks[i]
        returns[i], cut_off[i] = value, discount
    return returns, cut_off
