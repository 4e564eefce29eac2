"""Pixel observations (`visual-*`): frame stacks of a dataset's batch, random crops, and the IMPALA encoder.

Frames are 64x64x3 uint8; three of them, stacked on the channel axis, are an observation.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

NUM_FRAMES = 3  # frames of an observation
PADDING = 3  # pixels of a random crop's shift


def trajectory_starts(terminals):
    """Row of each transition's trajectory start: terminals (N,), 1 in a trajectory's last transition -> (N,) int64."""
    ends = torch.as_tensor(terminals).bool()
    begins = torch.cat([torch.ones(1, dtype=torch.bool), ends[:-1]])
    return torch.cummax(torch.where(begins, torch.arange(len(ends)), 0), dim=0).values


def gather_frames(dataset, indices):
    """A batch of frame-stacked transitions, {key: (S, B, ...)} without starts.

    Its observations and next_observations are (S, B, 64, 64, 3 * NUM_FRAMES), the oldest frame first, a trajectory's
    first frame repeated, as `envs.stack_frames` does.

    Args:
        dataset: {observations, next_observations (N, 64, 64, 3) uint8, starts (N,), other keys (N, ...)}.
        indices: (S, B).
    """
    others = ("observations", "next_observations", "starts")
    batch = {key: value[indices] for key, value in dataset.items() if key not in others}
    back = torch.arange(NUM_FRAMES - 1, -1, -1, device=indices.device)
    rows = torch.maximum(indices.unsqueeze(-1) - back, dataset["starts"][indices].unsqueeze(-1))  # (S, B, F)
    frames = dataset["observations"][rows]  # (S, B, F, 64, 64, 3)
    next_frames = torch.cat([frames[:, :, 1:], dataset["next_observations"][indices].unsqueeze(2)], dim=2)
    stack = lambda frames: frames.movedim(2, -2).flatten(-2)
    return batch | {"observations": stack(frames), "next_observations": stack(next_frames)}


def draw_crops(generator, num_updates, batch_size):
    """Shifts of `num_updates` batches of one seed: (num_updates, B, 2) in 0..2 * PADDING; half of the batches are
    left as they are, with the shift PADDING.
    """
    source = dict(generator=generator, device=generator.device)
    shifts = torch.randint(2 * PADDING + 1, (num_updates, batch_size, 2), **source)
    augmented = torch.rand(num_updates, 1, 1, **source) < 0.5
    return torch.where(augmented, shifts, PADDING)


def crop(images, shifts):
    """Pads by edge replication and crops back at an offset: images (B, H, W, C), shifts (B, 2) -> the same shape."""
    B, H, W, _ = images.shape
    device = images.device
    rows = (torch.arange(H, device=device) + shifts[:, :1] - PADDING).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=device) + shifts[:, 1:] - PADDING).clamp(0, W - 1)  # (B, W)
    batch = torch.arange(B, device=device).view(B, 1, 1)
    return images[batch, rows.unsqueeze(-1), columns.unsqueeze(-2)]


class Encoder(nn.Module):
    """IMPALA's small encoder: three stages (conv 3x3, max-pool 3x3 of stride 2, residual block of two convolutions) of
    widths 16, 32, 32, then ReLU, Linear, GELU. Weights are drawn Glorot-uniform from torch's global generator.

    Args:
        shape: (H, W, C) of an observation, H and W divisible by 8.
    """

    features = 512

    def __init__(self, shape):
        super().__init__()
        H, W, channels = shape
        pairs = []
        for width in (16, 32, 32):
            pairs += [(channels, width), (width, width), (width, width)]
            channels = width
        rows = H // 8 * (W // 8) * channels
        glorot = lambda fans, *shape: (2 * torch.rand(shape) - 1) * math.sqrt(6 / fans)
        self.kernels = nn.ParameterList(glorot(9 * (i + o), o, i, 3, 3) for i, o in pairs)
        self.kernel_biases = nn.ParameterList(torch.zeros(o) for _, o in pairs)
        self.weight = nn.Parameter(glorot(rows + self.features, rows, self.features))
        self.bias = nn.Parameter(torch.zeros(self.features))

    def forward(self, images):
        """(N, H, W, C) uint8 -> (N, 512)."""
        x = images.permute(0, 3, 1, 2) / 255.0  # (N, C, H, W)
        convolution = lambda x, i: F.conv2d(x, self.kernels[i], self.kernel_biases[i], padding=1)
        for first in (0, 3, 6):
            x = convolution(x, first)
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)  # "same" padding of an even size
            x = x + convolution(F.relu(convolution(F.relu(x), first + 1)), first + 2)
        x = F.relu(x).flatten(1)  # (N, 32 * H/8 * W/8)
        return F.gelu(x @ self.weight + self.bias, approximate="tanh")
