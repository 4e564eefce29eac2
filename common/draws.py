"""Random draws: every index and noise of the updates, by one generator per seed, in chunks of many updates."""

import numpy as np
import torch

CHUNK = 50  # updates whose indices and noise are drawn at once


class Draws:
    """The random numbers of each update: a function of the step alone, so a resumed run needs none of them saved.

    Args:
        agent: gives `draw_noise` and `draw_act_noise`.
        args: the run's arguments.
        seeds: the S seeds.
        num_transitions: of the offline dataset.
        device: torch device.
    """

    def __init__(self, agent, args, seeds, num_transitions, device):
        self.source = agent, args, seeds, num_transitions
        self.device = device
        self.chunk, self.key = None, None

    def __call__(self, step, online=False):
        """{name: (S, ...)} of the update after `step` updates; see draw_chunk."""
        if (step // CHUNK, online) != self.key:
            self.key = step // CHUNK, online
            self.chunk = draw_chunk(*self.source, step // CHUNK, self.device, online)
        return {name: value[step % CHUNK] for name, value in self.chunk.items()}


def chunk_generator(seed, chunk, device):
    """The generator of one seed's draws in one chunk of updates: a function of (seed, chunk), so nothing to save."""
    state = int(np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)


def draw_chunk(agent, args, seeds, num_transitions, chunk, device, online=False):
    """Batch indices and noise of CHUNK updates: {"indices": (CHUNK, S, B), noise name: (CHUNK, S, rows, dim)}.

    Each seed draws with its own generator, so that it draws the same alone and beside others. Online, indices are
    integers below 2**62, which `Replay.batch` brings into the buffer's growing range, and "act" is the noise of
    an action an update.
    """
    num_transitions = 2**62 if online else num_transitions
    draws = []
    for seed in seeds:
        generator = chunk_generator(seed, chunk, device)
        shape = (CHUNK, args.batch_size)
        indices = torch.randint(num_transitions, shape, generator=generator, device=device)
        draws.append({"indices": indices} | agent.draw_noise(generator, CHUNK))
        if online:
            draws[-1]["act"] = agent.draw_act_noise(generator, CHUNK)
    return {name: torch.stack([draw[name] for draw in draws], dim=1) for name in draws[0]}
