"""Pixel observations: frame stacks, crops, the encoder against a plain one, and Value Flows on images."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import value_flows
from common import datasets, envs, pixels
from common.replay import Replay
from conftest import ROOT, gradients, make_agent, small_args

SHAPE = (16, 16, 9)


def make_frames(num_trajectories=3, length=5):
    """A dataset of frames whose every pixel is 10 * trajectory + time."""
    rows = torch.arange(num_trajectories * length)
    value = (10 * (rows // length) + rows % length).to(torch.uint8)
    image = lambda value: value.view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    dataset = {"observations": image(value), "next_observations": image(value + 1), "rewards": rows.float()}
    terminals = (rows % length == length - 1).float()
    return dataset | {"starts": pixels.trajectory_starts(terminals)}


def test_batches_stack_frames_as_the_environments_wrapper_does():
    dataset = make_frames()
    assert dataset["starts"].tolist() == [0] * 5 + [5] * 5 + [10] * 5
    indices = torch.tensor([[0, 1, 2], [5, 9, 13]])
    batch = Replay(dataset, 2, 0).batch({"indices": indices})
    assert set(batch) == {"observations", "next_observations", "rewards"}
    assert batch["observations"].shape == (2, 3, 4, 4, 9) and batch["observations"].dtype == torch.uint8
    times = batch["observations"][:, :, 0, 0, ::3].tolist()
    assert times == [[[0, 0, 0], [0, 0, 1], [0, 1, 2]], [[10, 10, 10], [12, 13, 14], [21, 22, 23]]]
    times = batch["next_observations"][:, :, 0, 0, ::3].tolist()
    assert times == [[[0, 0, 1], [0, 1, 2], [1, 2, 3]], [[10, 10, 11], [13, 14, 15], [22, 23, 24]]]

    class Env:  # the first trajectory, played
        def reset(self):
            self.time = 0
            return np.zeros((4, 4, 3), np.uint8), {}

        def step(self, action):
            self.time += 1
            return np.full((4, 4, 3), self.time, np.uint8), 0.0, False, False, {}

    env = envs.FrameStack(Env(), pixels.NUM_FRAMES)
    played = [env.reset()[0], env.step(None)[0], env.step(None)[0]]
    assert np.array_equal(np.stack(played), batch["observations"][0].numpy())


def test_crop_equals_padding_by_edge_replication_and_cutting():
    images = torch.randint(256, (2, 4, 16, 16, 9), dtype=torch.uint8)
    shifts = torch.randint(7, (2, 4, 2))
    shifts[0, 0], shifts[0, 1], shifts[0, 2] = torch.tensor([3, 3]), torch.tensor([0, 6]), torch.tensor([6, 0])
    cropped = pixels.crop(images, shifts)
    for s in range(2):
        for b in range(4):
            padded = np.pad(images[s, b].numpy(), ((3, 3), (3, 3), (0, 0)), mode="edge")
            y, x = shifts[s, b].tolist()
            assert np.array_equal(cropped[s, b].numpy(), padded[y : y + 16, x : x + 16])
    assert torch.equal(cropped[0, 0], images[0, 0])


def test_half_of_the_batches_are_shifted_and_a_batchs_rows_differ():
    shifts = pixels.draw_crops(torch.Generator().manual_seed(0), 2_000, 8)
    assert shifts.shape == (2_000, 8, 2) and shifts.min() == 0 and shifts.max() == 6
    still = (shifts == 3).all(dim=(1, 2))
    assert abs(still.float().mean() - 0.5) < 0.05
    moving = shifts[~still]
    counts = torch.bincount(moving.flatten(), minlength=7) / moving.numel()
    assert (counts - 1 / 7).abs().max() < 0.01 and (moving[:, 0] != moving[:, 1]).any()


def test_encoder_equals_one_written_out_for_each_seed():
    encoder = pixels.Encoder(2, SHAPE)
    pixels.init_encoders(encoder, [3, 4])
    with torch.no_grad():
        for bias in [*encoder.kernel_biases, encoder.bias]:
            bias.normal_()
    images = torch.randint(256, (2, 5, *SHAPE), dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (2, 5, 512)
    for s in range(2):
        x = images[s].permute(0, 3, 1, 2).float() / 255
        for stage in range(3):
            i = 3 * stage
            x = F.conv2d(x, encoder.kernels[i][s], encoder.kernel_biases[i][s], padding=1)
            # "same" pooling of an even size: windows start at 0, 2, 4, ...; the last one is cut off at the edge.
            x = F.unfold(F.pad(x, (0, 1, 0, 1), value=-1e9), 3, stride=2).unflatten(1, (-1, 9)).amax(dim=2)
            x = x.unflatten(2, (int(x.shape[2] ** 0.5), -1))
            h = F.conv2d(F.relu(x), encoder.kernels[i + 1][s], encoder.kernel_biases[i + 1][s], padding=1)
            x = x + F.conv2d(F.relu(h), encoder.kernels[i + 2][s], encoder.kernel_biases[i + 2][s], padding=1)
        x = F.gelu(F.relu(x).flatten(1) @ encoder.weight[s] + encoder.bias[s], approximate="tanh")
        torch.testing.assert_close(out[s], x, rtol=1e-4, atol=1e-4)


def test_encoder_weights_are_glorot_uniform_and_each_seeds_own():
    stacked, alone = pixels.Encoder(2, SHAPE), pixels.Encoder(1, SHAPE)
    pixels.init_encoders(stacked, [3, 4])
    pixels.init_encoders(alone, [4])
    for a, b in zip(stacked.parameters(), alone.parameters()):
        assert torch.equal(a[1], b[0])
    kernel = stacked.kernels[-1][0]
    bound = (6 / (9 * 64)) ** 0.5
    assert kernel.abs().max() <= bound and abs(kernel.std() - bound / 3**0.5) < 0.002
    assert all((bias == 0).all() for bias in [*stacked.kernel_biases, stacked.bias])


def test_every_network_starts_with_an_encoder_of_its_own_and_targets_with_a_copy():
    agent = value_flows.Agent(small_args("value_flows"), SHAPE, 3, [0, 1], -1.0, 0.0)
    weights = {name: encoder.weight for name, encoder in agent.encoders.items()}
    assert torch.equal(weights["target_critic_flow"], weights["critic_flow"])
    own = [weights[name] for name in ("critic_flow", "actor_flow", "actor_onestep_flow")]
    assert not any(torch.equal(own[i], own[j]) for i in range(3) for j in range(i))


def image_inputs(agent, num_seeds, update=0):
    """A random batch of images with its noise."""
    generator = torch.Generator().manual_seed(update)
    S, B = num_seeds, agent.args.batch_size
    image = lambda: torch.randint(256, (S, B, *SHAPE), dtype=torch.uint8, generator=generator)
    batch = {"observations": image(), "next_observations": image(), "masks": torch.ones(S, B)}
    batch |= {"actions": torch.rand(S, B, 3, generator=generator) * 2 - 1, "rewards": -torch.ones(S, B)}
    noise = [agent.draw_noise(torch.Generator().manual_seed(100 * update + s), 1) for s in range(S)]
    return batch, {name: torch.stack([n[name][0] for n in noise]) for name in noise[0]}


def test_value_flows_on_images_moves_each_networks_own_encoder():
    agent = make_agent(small_args("value_flows"), seeds=(0, 1), obs_dim=SHAPE)
    batch, noise = image_inputs(agent, 2)
    agent.critic_loss(batch, noise)[0].sum().backward()
    moved = {".".join(name.split(".")[:2]) for name in gradients(agent) if name.startswith("encoders")}
    assert moved == {"encoders.critic_flow"}
    agent.zero_grad()
    agent.actor_loss(batch, noise)[0].sum().backward()
    moved = {".".join(name.split(".")[:2]) for name in gradients(agent) if name.startswith("encoders")}
    assert moved == {"encoders.actor_flow", "encoders.actor_onestep_flow"}

    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    metrics = agent.update(batch, noise)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    target, online = "encoders.target_critic_flow.", "encoders.critic_flow."
    for name, parameter in agent.named_parameters():
        if name.startswith(target):
            expected = before[name].lerp(before[name.replace(target, online)], agent.args.tau)
            torch.testing.assert_close(parameter, expected)
    actions = agent.act(batch["observations"], torch.randn(2, agent.args.batch_size, 4, 4))
    assert actions.shape == (2, agent.args.batch_size, 3)


def test_each_network_sees_the_shifted_images_through_its_own_encoder(monkeypatch):
    agent = make_agent(small_args("value_flows"), seeds=(0, 1), obs_dim=SHAPE)
    assert not torch.equal(agent.encoders["target_critic_flow"].weight, agent.encoders["critic_flow"].weight)
    batch, noise = image_inputs(agent, 2)
    noise["crop"] = torch.randint(7, noise["crop"].shape)
    shifted = {name: pixels.crop(batch[name], noise["crop"]) for name in ("observations", "next_observations")}
    names = {id(encoder): name for name, encoder in agent.encoders.items()}
    seen, forward = set(), pixels.Encoder.forward

    def watched(encoder, images):
        which = [name for name, image in shifted.items() if torch.equal(images, image)]
        seen.add((names[id(encoder)], *which))
        return forward(encoder, images)

    monkeypatch.setattr(pixels.Encoder, "forward", watched)
    batch_shifted = batch | shifted
    agent.critic_loss(batch_shifted, noise)
    online, target = "critic_flow", "target_critic_flow"
    now, later = "observations", "next_observations"
    critic = {("actor_flow", later), (online, later), (target, later), (target, now), (online, now)}
    assert seen == critic
    seen.clear()
    agent.actor_loss(batch_shifted, noise)
    actor = {("actor_flow", now), ("actor_onestep_flow", now), (online, now)}
    assert seen == actor
    seen.clear()
    agent.statistics(batch, noise)
    assert seen == {(online, now)}
    seen.clear()
    agent.update(batch, noise)
    assert seen == critic | actor


def test_on_images_the_losses_are_those_of_states_with_the_encoders_outputs():
    images = make_agent(small_args("value_flows"), seeds=(0, 1), obs_dim=SHAPE)
    states = make_agent(small_args("value_flows"), seeds=(0, 1), obs_dim=512)
    states.load_state_dict({name: v for name, v in images.state_dict().items() if not name.startswith("encoders")})
    first = images.encoders["critic_flow"].state_dict()
    for encoder in images.encoders.values():
        encoder.load_state_dict(first)
    batch, noise = image_inputs(images, 2)
    with torch.no_grad():
        encoded = {name: images.encoders["critic_flow"](batch[name]) for name in ("observations", "next_observations")}
    for loss in ("critic_loss", "actor_loss"):
        mine, expected = getattr(images, loss)(batch, noise)[1], getattr(states, loss)(batch | encoded, noise)[1]
        for name, value in mine.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_stacked_seeds_on_images_equal_each_seed_alone():
    args = small_args("value_flows")
    stacked = make_agent(args, seeds=(0, 1), obs_dim=SHAPE)
    batch, noise = image_inputs(stacked, 2)
    out = stacked.update(batch, noise)
    for s in range(2):
        alone = make_agent(args, seeds=(s,), obs_dim=SHAPE)
        pick = lambda tensors: {name: value[s : s + 1] for name, value in tensors.items()}
        for name, value in alone.update(pick(batch), pick(noise)).items():
            torch.testing.assert_close(out[name][s], value[0], rtol=1e-3, atol=1e-4)


LOAD = """
import sys, torch
from common import datasets, envs
envs.check_env_id("visual-cube-single-play-singletask-v0")  # as every run begins
dataset, _ = datasets.load_dataset(sys.argv[1], "visual-cube-single-play-singletask-v0", "cpu")
torch.save(dataset, sys.argv[2])
"""


def test_a_visual_dataset_loads_as_frames(cube_data, tmp_path):
    """A visual file is a state file with frames as observations; rewards come from its qpos."""
    with np.load(cube_data) as file:
        arrays = {key: file[key] for key in file.files}
    rows = len(arrays["terminals"])
    arrays["observations"] = np.random.default_rng(0).integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "visual-cube-single-play-v0.npz"
    np.savez(path, **arrays)
    command = [sys.executable, "-c", LOAD, path, tmp_path / "loaded.pt"]  # this process has switched OpenGL off
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode and "GL" in done.stderr:
        pytest.skip("no OpenGL on this machine")
    assert done.returncode == 0, done.stderr[-2000:]
    dataset = torch.load(tmp_path / "loaded.pt")
    states, _ = datasets.load_dataset(cube_data, "cube-single-play-singletask-v0", "cpu")
    assert dataset["observations"].dtype == torch.uint8 and dataset["observations"].shape == (rows - 2, 64, 64, 3)
    for key in ("rewards", "masks", "actions"):
        assert torch.equal(dataset[key], states[key])
    assert dataset["starts"].unique().tolist() == [0, 1000]
    first = Replay(dataset, 1, 0).batch({"indices": torch.tensor([[1000]])})["observations"][0, 0]
    assert torch.equal(first[..., :3], first[..., 6:]) and torch.equal(first[..., 6:], dataset["observations"][1000])
