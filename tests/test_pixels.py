"""Pixel observations: frame stacks, crops, the encoder against a plain one, and Value Flows on images."""

import os
import subprocess
import sys

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT, gradients, make_agent, make_agents, small_args, update

import value_flows
from common import datasets, envs, pixels, policies
from common.replay import Replay

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

    class Env(gymnasium.Env):  # the first trajectory, played
        observation_space = gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)

        def reset(self, **kwargs):
            self.time = 0
            return np.zeros((4, 4, 3), np.uint8), {}

        def step(self, action):
            self.time += 1
            return np.full((4, 4, 3), self.time, np.uint8), 0.0, False, False, {}

    env = envs.stack_frames(Env(), pixels.NUM_FRAMES)
    played = [env.reset()[0], env.step(None)[0], env.step(None)[0]]
    assert np.array_equal(np.stack(played), batch["observations"][0].numpy())


def test_agents_of_images_are_made_for_stacks_of_frames():
    inputs = Replay(make_frames() | {"actions": torch.zeros(15, 2)}, 1, 0).agent_inputs()
    assert inputs == {"obs_dim": (4, 4, 9), "action_dim": 2, "min_reward": 0.0, "max_reward": 14.0}


def test_a_policy_acts_on_one_image_or_on_several():
    args = small_args("value_flows", env_id="visual-cube-single-play-singletask-v0")
    policy = policies.Policy(make_agents(args, obs_dim=SHAPE), "act", args)
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    several = policy.act(images)
    policy.generator.manual_seed(0)
    assert several.shape == (2, 3) and policy.act(images[0]).shape == (3,)
    assert np.abs(several).max() <= 1 and not np.array_equal(several[0], several[1])


def test_crop_equals_padding_by_edge_replication_and_cutting():
    images = torch.randint(256, (4, 16, 16, 9), dtype=torch.uint8)
    shifts = torch.tensor([[3, 3], [0, 6], [6, 0], [2, 5]])
    cropped = pixels.crop(images, shifts)
    for b in range(4):
        padded = np.pad(images[b].numpy(), ((3, 3), (3, 3), (0, 0)), mode="edge")
        y, x = shifts[b].tolist()
        assert np.array_equal(cropped[b].numpy(), padded[y : y + 16, x : x + 16])
    assert torch.equal(cropped[0], images[0])


def test_half_of_the_batches_are_shifted_and_a_batchs_rows_differ():
    shifts = pixels.draw_crops(torch.Generator().manual_seed(0), 2_000, 8)
    assert shifts.shape == (2_000, 8, 2) and shifts.min() == 0 and shifts.max() == 6
    still = (shifts == 3).all(dim=(1, 2))
    assert abs(still.float().mean() - 0.5) < 0.05
    moving = shifts[~still]
    counts = torch.bincount(moving.flatten(), minlength=7) / moving.numel()
    assert (counts - 1 / 7).abs().max() < 0.01 and (moving[:, 0] != moving[:, 1]).any()
    assert ((moving[..., 0] != moving[..., 1]).float().mean() - 6 / 7).abs() < 0.02  # rows and columns of their own


def test_encoder_equals_one_written_out():
    encoder = pixels.Encoder(SHAPE)
    with torch.no_grad():
        for bias in [*encoder.kernel_biases, encoder.bias]:
            bias.normal_()
    images = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (5, 512)
    x = images.permute(0, 3, 1, 2).float() / 255
    for i in (0, 3, 6):
        x = F.conv2d(x, encoder.kernels[i], encoder.kernel_biases[i], padding=1)
        # "same" pooling of an even size: windows start at 0, 2, 4, ...; the last one is cut off at the edge.
        x = F.unfold(F.pad(x, (0, 1, 0, 1), value=-1e9), 3, stride=2).unflatten(1, (-1, 9)).amax(dim=2)
        x = x.unflatten(2, (int(x.shape[2] ** 0.5), -1))
        h = F.conv2d(F.relu(x), encoder.kernels[i + 1], encoder.kernel_biases[i + 1], padding=1)
        x = x + F.conv2d(F.relu(h), encoder.kernels[i + 2], encoder.kernel_biases[i + 2], padding=1)
    x = F.gelu(F.relu(x).flatten(1) @ encoder.weight + encoder.bias, approximate="tanh")
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


def test_encoder_weights_are_glorot_uniform():
    encoder = pixels.Encoder(SHAPE)
    for weight, fans in ((encoder.kernels[-1], 9 * 64), (encoder.weight, 128 + 512)):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound and abs(weight.std() - bound / 3**0.5) < 0.002
    assert all((bias == 0).all() for bias in [*encoder.kernel_biases, encoder.bias])


NETWORKS = ("critic_flow", "actor_flow", "actor_onestep_flow", "target_critic_flow")


def test_every_network_starts_with_an_encoder_of_its_own_and_targets_with_a_copy():
    agent = value_flows.Agent(small_args("value_flows"), SHAPE, 3, -1.0, 0.0)
    weights = {name: getattr(agent, name).encoder.weight for name in NETWORKS}
    assert torch.equal(weights["target_critic_flow"], weights["critic_flow"])
    own = [weights[name] for name in NETWORKS[:3]]
    assert not any(torch.equal(own[i], own[j]) for i in range(3) for j in range(i))


def image_inputs(agent, seeds, number=0):
    """Random batches of images with their noise, stacked over the seeds."""
    B, batches, noises = agent.args.batch_size, [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 * number + seed)
        image = lambda: torch.randint(256, (B, *SHAPE), dtype=torch.uint8, generator=generator)
        batch = {"observations": image(), "next_observations": image(), "masks": torch.ones(B)}
        batches.append(batch | {"actions": torch.rand(B, 3, generator=generator) * 2 - 1, "rewards": -torch.ones(B)})
        noises.append({name: value[0] for name, value in agent.draw_noise(generator, 1).items()})
    stack = lambda dictionaries: {name: torch.stack([d[name] for d in dictionaries]) for name in dictionaries[0]}
    return stack(batches), stack(noises)


def moved_encoders(agents):
    return {name.split(".")[0] for name in gradients(agents) if ".encoder." in name}


def test_value_flows_on_images_moves_each_networks_own_encoder():
    agents = make_agents(small_args("value_flows"), (0, 1), obs_dim=SHAPE)
    batch, noise = image_inputs(agents.agent, (0, 1))
    agents.backward("critic_loss", batch, noise, trains=("critic_flow",))
    assert moved_encoders(agents) == {"critic_flow"}
    agents.optimizer.zero_grad()
    agents.backward("actor_loss", batch, noise, trains=("actor_flow", "actor_onestep_flow"))
    assert moved_encoders(agents) == {"actor_flow", "actor_onestep_flow"}

    before = {name: p.detach().clone() for name, p in agents.parameters.items()}
    metrics = update(agents, batch, noise)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    for name, parameter in agents.parameters.items():
        if name.startswith("target_critic_flow.encoder."):
            expected = before[name].lerp(before[name.removeprefix("target_")], agents.agent.args.tau)
            torch.testing.assert_close(parameter, expected)
    B = agents.agent.args.batch_size
    assert agents.function("act")(batch["observations"], torch.randn(2, B, 4, 4)).shape == (2, B, 3)


def test_each_network_sees_images_through_its_own_encoder(monkeypatch):
    agent = make_agent(small_args("value_flows"), obs_dim=SHAPE)
    batch, noise = ({name: value[0] for name, value in inputs.items()} for inputs in image_inputs(agent, (0,)))
    names = {id(getattr(agent, name).encoder): name for name in NETWORKS}
    seen, forward = set(), pixels.Encoder.forward

    def watched(encoder, images):
        which = [name for name in ("observations", "next_observations") if torch.equal(images, batch[name])]
        seen.add((names[id(encoder)], *which))
        return forward(encoder, images)

    monkeypatch.setattr(pixels.Encoder, "forward", watched)
    agent.critic_loss(batch, noise)
    online, target = "critic_flow", "target_critic_flow"
    now, later = "observations", "next_observations"
    assert seen == {("actor_flow", later), (online, later), (target, later), (target, now), (online, now)}
    seen.clear()
    agent.actor_loss(batch, noise)
    assert seen == {("actor_flow", now), ("actor_onestep_flow", now), (online, now)}


def test_an_update_is_that_of_the_shifted_images():
    args, seeds = small_args("value_flows"), (0, 1)
    shifted, plain = (make_agents(args, seeds, obs_dim=SHAPE) for _ in range(2))
    batch, noise = image_inputs(shifted.agent, seeds)
    noise["crop"] = torch.randint(7, noise["crop"].shape)
    crops = {n: torch.stack([pixels.crop(x, s) for x, s in zip(batch[n], noise["crop"])]) for n in list(batch)[:2]}
    expected = update(plain, batch | crops, noise | {"crop": torch.full_like(noise["crop"], pixels.PADDING)})
    for name, value in update(shifted, batch, noise).items():
        torch.testing.assert_close(value, expected[name])


def test_on_images_the_losses_are_those_of_states_with_the_encoders_outputs():
    images = make_agent(small_args("value_flows"), obs_dim=SHAPE)
    states = make_agent(small_args("value_flows"), obs_dim=512)
    states.load_state_dict({name: v for name, v in images.state_dict().items() if ".encoder." not in name})
    for name in NETWORKS[1:]:
        getattr(images, name).encoder.load_state_dict(images.critic_flow.encoder.state_dict())
    batch, noise = ({name: value[0] for name, value in inputs.items()} for inputs in image_inputs(images, (0,)))
    with torch.no_grad():
        encoded = {name: images.critic_flow.encoder(batch[name]) for name in ("observations", "next_observations")}
    for loss in ("critic_loss", "actor_loss"):
        mine, expected = getattr(images, loss)(batch, noise)[1], getattr(states, loss)(batch | encoded, noise)[1]
        for name, value in mine.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_stacked_seeds_on_images_equal_each_seed_alone():
    args, seeds = small_args("value_flows"), (0, 1)
    stacked = make_agents(args, seeds, obs_dim=SHAPE)
    out = update(stacked, *image_inputs(stacked.agent, seeds))
    for s, seed in enumerate(seeds):
        alone = make_agents(args, (seed,), obs_dim=SHAPE)
        for name, value in update(alone, *image_inputs(alone.agent, (seed,))).items():
            torch.testing.assert_close(out[name][s], value[0], rtol=1e-3, atol=1e-4)


LOAD = """
import sys, torch
from common import datasets, envs
envs.check_env_id("visual-cube-single-play-singletask-v0")  # as every run begins
dataset, _ = datasets.load_dataset(sys.argv[1], "visual-cube-single-play-singletask-v0", "cpu")
torch.save(dataset, sys.argv[2])
"""


def test_a_visual_dataset_loads_as_frames(opengl, cube_data, tmp_path):
    """A visual file is a state file with frames as observations; rewards come from its qpos."""
    with np.load(cube_data) as file:
        arrays = {key: file[key] for key in file.files}
    rows = len(arrays["terminals"])
    arrays["observations"] = np.random.default_rng(0).integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "visual-cube-single-play-v0.npz"
    np.savez(path, **arrays)
    command = [sys.executable, "-c", LOAD, path, tmp_path / "loaded.pt"]  # this process has switched OpenGL off
    environment = os.environ | {"MUJOCO_GL": "disable"}  # as the launcher does, which its jobs inherit
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    dataset = torch.load(tmp_path / "loaded.pt")
    states, _ = datasets.load_dataset(cube_data, "cube-single-play-singletask-v0", "cpu")
    assert dataset["observations"].dtype == torch.uint8 and dataset["observations"].shape == (rows - 2, 64, 64, 3)
    for key in ("rewards", "masks", "actions"):
        assert torch.equal(dataset[key], states[key])
    assert dataset["starts"].unique().tolist() == [0, 1000]
    first = Replay(dataset, 1, 0).batch({"indices": torch.tensor([[1000]])})["observations"][0, 0]
    assert torch.equal(first[..., :3], first[..., 6:]) and torch.equal(first[..., 6:], dataset["observations"][1000])
