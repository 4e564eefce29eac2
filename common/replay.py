"""The replay buffer: the offline dataset, which all seeds share, and each seed's own online transitions."""

import torch

from common import pixels

CAPACITY = 2_000_000  # transitions, the offline ones included


class Replay:
    """A buffer of S seeds that begins as the N offline transitions {key: (N, ...)}, on their device.

    Slot i < N is offline transition i, and the n-th online transition goes to slot (N + n) mod capacity: a full buffer
    overwrites its oldest ones. The capacity is 2M, or N + 1 for a larger dataset. Offline transitions are stored once;
    row n mod M of `rows` holds a seed's n-th online transition, of which there are at most `online_timesteps`.
    """

    def __init__(self, dataset, num_seeds, online_timesteps):
        self.dataset, self.count = dataset, 0  # count: online transitions per seed so far
        self.capacity = max(CAPACITY, len(dataset["rewards"]) + 1)
        M = min(online_timesteps, self.capacity)
        self.rows = {key: value.new_zeros(num_seeds, M, *value.shape[1:]) for key, value in dataset.items()}

    def agent_inputs(self):
        """What an agent must know: obs_dim (of pixels the shape of a frame stack), action_dim, extreme rewards."""
        data, rewards = self.dataset, self.dataset["rewards"]
        *image, last = data["observations"].shape[1:]  # (D) of states, (H, W, channels) of frames
        obs_dim = (*image, last * pixels.NUM_FRAMES) if image else last
        dims = {"obs_dim": obs_dim, "action_dim": data["actions"].shape[1]}
        return dims | {"min_reward": rewards.min().item(), "max_reward": rewards.max().item()}

    def append(self, transitions):
        """Adds one online transition of every seed, {key: (S, ...)}; returns how many each seed has, on the device."""
        for key, rows in self.rows.items():
            rows[:, self.count % rows.shape[1]] = transitions[key]
        self.count += 1
        return torch.full((), self.count, device=self.dataset["rewards"].device)

    def state(self):
        """The online transitions for a checkpoint, on the CPU: {key: (S, at most M, ...)}."""
        # Seed by seed, since a GPU would first copy a part of all of them on itself.
        return {key: torch.stack([seed[: self.count].cpu() for seed in rows]) for key, rows in self.rows.items()}

    def restore(self, saved, count):
        """Takes over a checkpoint's online transitions, of which there have been `count` per seed."""
        for key, rows in saved.items():
            self.rows[key][:, : rows.shape[1]] = rows
        self.count = count

    def inputs(self, draws):
        """What an update takes: the batch at `draws["indices"]`, and the other entries of `draws`, the noise."""
        return self.batch(draws), {name: value for name, value in draws.items() if name not in ("indices", "count")}

    def batch(self, draws):
        """A batch {key: (S, B, ...)}, uniform over the offline and, in the online phase, the online transitions.

        Offline, draws are {"indices" (S, B) of transitions}. Online they have "count" of `append` too, and "indices"
        are uniform integers of a range far above the buffer's size.
        """
        indices = draws["indices"]
        if "starts" in self.dataset:
            return pixels.gather_frames(self.dataset, indices)
        if "count" not in draws:
            return {key: value[indices] for key, value in self.dataset.items()}
        N, (S, M), count = len(self.dataset["rewards"]), self.rows["rewards"].shape, draws["count"]
        slots = indices % (count + N).clamp(max=self.capacity)  # (S, B)
        numbers = (slots - N) % self.capacity  # (S, B), of the online transition that lies there, if one does
        seeds = torch.arange(S, device=indices.device).unsqueeze(1)
        batch = {}
        for key, offline in self.dataset.items():
            is_online = (numbers < count).view(*slots.shape, *[1] * (offline.ndim - 1))  # (S, B, ...)
            online = self.rows[key][seeds, numbers % M]
            batch[key] = torch.where(is_online, online, offline[slots.clamp(max=N - 1)])
        return batch
