"""Random draws: every index and noise of the updates, by one generator per seed, in chunks of many updates."""

import numpy as np
import torch

CHUNK = 50  # updates whose indices and noise are drawn at once


class Draws:
    """The random numbers of each update: functions of seed and step alone, so a resumed run needs none of them saved.

    The agent gives `draw_noise` and `draw_act_noise`; `num_transitions` are those of the offline dataset.
    """

    def __init__(self, agent, args, seeds, num_transitions, device):
        self.agent, self.args, self.seeds, self.device = agent, args, seeds, device
        self.num_transitions = num_transitions
        self.key, self.drawn = None, None  # which chunk, and its draws

    def __call__(self, step, online=False):
        """{"indices": (S, B), noise name: (S, ...)} of the update after `step` updates.

        In the online phase indices are integers below 2**62, whose remainder by the buffer's size is taken, and "act"
        is drawn too, the noise of one action.
        """
        if (step // CHUNK, online) != self.key:
            self.key = step // CHUNK, online
            self.drawn = self.chunk(*self.key)
        return {name: value[step % CHUNK] for name, value in self.drawn.items()}

    def chunk(self, number, online=False):
        """All draws of CHUNK updates, with a leading axis of updates; functions of (seed, number) for each seed."""
        high, shape = 2**62 if online else self.num_transitions, (CHUNK, self.args.batch_size)
        draws = []
        for seed in self.seeds:  # each with its own generator, so that it draws the same alone and beside others
            state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1
            generator = torch.Generator(self.device).manual_seed(int(state))
            indices = torch.randint(high, shape, generator=generator, device=self.device)
            draws.append({"indices": indices} | self.agent.draw_noise(generator, CHUNK))
            if online:
                draws[-1]["act"] = self.agent.draw_act_noise(generator, CHUNK)
        return {name: torch.stack([draw[name] for draw in draws], dim=1) for name in draws[0]}
