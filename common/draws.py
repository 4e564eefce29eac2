"""Random draws: every index and noise of the updates, by one generator per seed, in chunks of many updates."""

import numpy as np
import torch

CHUNK = 50  # updates whose indices and noise are drawn at once


class Draws:
    """The random numbers of each update: a function of the step alone, so a resumed run needs none of them saved.

    Args: see draw_chunk.
    """

    def __init__(self, agent, args, seeds, num_transitions, device):
        self.source, self.device = (agent, args, seeds, num_transitions), device
        self.chunk, self.key = None, None

    def __call__(self, step, online=False):
        """{name: (S, ...)} of the update after `step` updates; see draw_chunk."""
        if (step // CHUNK, online) != self.key:
            self.key = step // CHUNK, online
            self.chunk = draw_chunk(*self.source, step // CHUNK, self.device, online)
        return {name: value[step % CHUNK] for name, value in self.chunk.items()}


def draw_chunk(agent, args, seeds, num_transitions, chunk, device, online=False):
    """Batch indices and noise of CHUNK updates, functions of (seed, chunk) for each seed.

    Args:
        agent: gives `draw_noise` and `draw_act_noise`.
        args, seeds: the run's arguments and the S seeds.
        num_transitions: of the offline dataset.
        chunk: number of the chunk.
        device: torch device.
        online: whether indices are integers below 2**62, whose remainder by the buffer's size is taken, and "act"
            is drawn too, the noise of one action per update.

    Returns:
        {"indices": (CHUNK, S, B), noise name: (CHUNK, S, rows, dim)}.
    """
    draws = []
    for seed in seeds:  # each with its own generator, so that it draws the same alone and beside others
        state = np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0] >> 1
        generator = torch.Generator(device).manual_seed(int(state))
        shape = (CHUNK, args.batch_size)
        indices = torch.randint(2**62 if online else num_transitions, shape, generator=generator, device=device)
        draws.append({"indices": indices} | agent.draw_noise(generator, CHUNK))
        if online:
            draws[-1]["act"] = agent.draw_act_noise(generator, CHUNK)
    return {name: torch.stack([draw[name] for draw in draws], dim=1) for name in draws[0]}
