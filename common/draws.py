"""Random draws: every index and noise of the updates, by one generator per seed, in chunks of many updates."""

import functools

import numpy as np
import torch

CHUNK = 50  # updates whose indices and noise are drawn at once


def make_draw(agent, args, seeds, num_transitions, device):
    """The random numbers of each update, as a function of (step, online=False) -> {name: (S, ...)}; see draw_chunk.

    They depend on the number of updates before, `step`, alone: a resumed run needs none of them saved.
    """
    chunk = functools.lru_cache(maxsize=1)(functools.partial(draw_chunk, agent, args, seeds, num_transitions))

    def draw(step, online=False):
        return {name: value[step % CHUNK] for name, value in chunk(step // CHUNK, device, online).items()}

    return draw


def draw_chunk(agent, args, seeds, num_transitions, chunk, device, online=False):
    """Batch indices and noise of CHUNK updates, functions of (seed, chunk) for each seed.

    Returns {"indices": (CHUNK, S, B), noise name: (CHUNK, S, rows, dim)}. If `online`, indices are integers below
    2**62, whose remainder by the buffer's size is taken, and "act" is drawn too, the noise of one action per update.

    Args:
        agent: gives `draw_noise` and `draw_act_noise`.
        args, seeds, device: the run's arguments, the S seeds, and the torch device.
        num_transitions, chunk: of the offline dataset, and the number of the chunk.
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
