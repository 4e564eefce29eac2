"""Evaluating a trained run, exporting its policy, loading and acting with it."""

import csv
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ALGORITHMS, ENV_ID, EVERY, ROOT, assert_refused, make_agents, run, small_args

from common import checkpoint, export, policies, rollout

NAMES = sorted(ALGORITHMS)
CHANGES = {"value_flows": ("--num-samples", 2), "q_flow": ("--flow-steps", 1), "evor": ("--num-actions", 2)}


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def observations(number=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(number, 2, generator=generator)  # pointmaze's dimension


@pytest.fixture(scope="module")
def exported(online_runs, tmp_path_factory):
    """{algorithm: (copy of its run, folder exported by --evaluate)}; two seeds, both phases."""
    folders = {}
    for name in NAMES:
        directory = tmp_path_factory.mktemp(name)
        run_dir, folder = directory / "run", directory / "folder"
        shutil.copytree(online_runs[name], run_dir)
        run(name, "--evaluate", run_dir, "--eval-episodes", 2, "--export", folder)
        folders[name] = run_dir, folder
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_policy_scores_what_its_run_scores(name, exported):
    run_dir, folder = exported[name]
    run(name, "--evaluate", folder, "--eval-episodes", 2)
    assert (folder / "inference.csv").read_bytes() == (run_dir / "inference.csv").read_bytes()
    rows = read_csv(folder / "inference.csv")
    assert [row["seed"] for row in rows] == ["0", "1"] == [row["episodes_seed"] for row in rows]
    config = json.loads((folder / "config.json").read_text())
    assert [row["success"] for row in config["evaluation"]] == [float(row["success"]) for row in rows]
    assert config["agent_inputs"]["obs_dim"] == 2 and config["step"] == 230
    assert config["algorithm"] == config["module"] == name


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_a_run_repeats_its_last_evaluation(name, exported, tmp_path):
    run_dir, _ = exported[name]
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.*") if path.name != "inference.csv"}
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("inference.csv"))
    run(name, "--evaluate", tmp_path / "run")
    last = [row for row in read_csv(run_dir / "eval.csv") if row["step"] == "230"]
    again = read_csv(tmp_path / "run/inference.csv")
    for old, new in zip(last, again, strict=True):
        assert {key: new[key] for key in old if key != "phase"} == {k: v for k, v in old.items() if k != "phase"}
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


@pytest.fixture
def played(monkeypatch):
    """[(seeds, step, name of the policy, folder and names of videos)] of the evaluations, none of which takes place,
    the arguments of the agents that would act, and whether their policies would be compiled.
    """
    asked, acting, compiled = [], [], []

    def play(evaluator, policy, draw_noise, step):
        asked.append((evaluator.seeds, step, policy.method, evaluator.video_dir, evaluator.video_names))
        acting.append(draw_noise.__self__.args)
        compiled.append(policy.compiled)
        result = {"success": 0.5, "episode_return": -1.0, "episode_length": 2.0, "episodes": 3}
        return [{"step": step, "seed": seed} | result for seed in evaluator.seeds]

    monkeypatch.setattr(rollout.Evaluator, "__call__", play)
    return asked, acting, compiled


def test_seed_is_that_of_the_episodes_and_videos_are_in_the_folder(exported, tmp_path, played):
    folder = tmp_path / "folder"
    shutil.copytree(exported["floq"][1], folder, ignore=shutil.ignore_patterns("inference.csv"))
    args, saved = ALGORITHMS["floq"].parse_args(["--evaluate", str(folder), "--seed", "7", "--capture-video"])
    policies.evaluate(ALGORITHMS["floq"].Agent, args, saved, (), torch.device("cpu"))
    rows = read_csv(folder / "inference.csv")
    names = ["seed0-episodes7", "seed1-episodes8"]  # training's seed1 is another video
    assert played[0] == [([7, 8], 230, "act", folder / "videos", names)]
    (folder / "inference.csv").write_text("")  # which a full disk leaves
    policies.evaluate(ALGORITHMS["floq"].Agent, args, saved, (), torch.device("cpu"))
    assert read_csv(folder / "inference.csv") == rows
    assert [(row["seed"], row["episodes_seed"]) for row in rows] == [("0", "7"), ("1", "8")]


@pytest.mark.parametrize("name", CHANGES)
def test_evaluate_changes_the_settings_of_acting(name, exported, tmp_path, played):
    _, folder = exported[name]
    shutil.copytree(folder, tmp_path / "folder", ignore=shutil.ignore_patterns("inference.csv"))
    flag, value = CHANGES[name]
    flags = "--eval-episodes", 2, "--compile", flag, value, "--export", tmp_path / "new"
    run(name, "--evaluate", tmp_path / "folder", *flags)
    setting = flag[2:].replace("-", "_")
    assert [row[setting] for row in read_csv(tmp_path / "folder/inference.csv")] == [str(value)] * 2
    assert getattr(ALGORITHMS[name].load(tmp_path / "new").args, setting) == value
    assert [getattr(args, setting) for args in played[1]] == [value] and played[2] == [name == "evor"]
    assert played[0][0][-1] == [f"seed{seed}-episodes{seed}-{setting}-{value}" for seed in (0, 1)]


def test_value_flows_plays_either_policy(exported, tmp_path):
    _, folder = exported["value_flows"]
    run("value_flows", "--evaluate", folder, "--eval-episodes", 1, "--eval-policy", "act", "--export", tmp_path)
    import value_flows

    by_phase, chosen = value_flows.load(folder), value_flows.load(tmp_path)
    assert (by_phase.policy.__name__, chosen.policy.__name__) == ("act_online", "act")  # the run ended online
    assert not np.array_equal(by_phase.act(observations().numpy()), chosen.act(observations().numpy()))
    assert value_flows.acting(value_flows.Args(total_timesteps=5), 5) == "act"
    assert value_flows.acting(value_flows.Args(total_timesteps=5), 6) == "act_online"


def test_evaluating_value_flows_plays_the_policy_of_its_phase_or_the_one_asked_for(exported, tmp_path, played):
    module, folder = ALGORITHMS["value_flows"], tmp_path / "folder"
    shutil.copytree(exported["value_flows"][1], folder, ignore=shutil.ignore_patterns("inference.csv"))
    for words in ([], ["--eval-policy", "act"]):
        args, saved = module.parse_args(["--evaluate", str(folder), *words])
        policies.evaluate(module.Agent, args, saved, module.INFERENCE, torch.device("cpu"), module.acting)
    assert [policy for _, _, policy, *_ in played[0]] == ["act_online", "act"]  # the run ended online


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_policy_acts_as_the_training_process_does(name, exported):
    run_dir, folder = exported[name]
    module, saved = ALGORITHMS[name], checkpoint.load(run_dir)
    args = module.Args(**saved["args"])
    agents = policies.rebuild(module.Agent, args, saved, torch.device("cpu"), run_dir)
    method = "act_online" if name == "value_flows" else "act"  # the online phase's
    obs, generator = observations(), torch.Generator().manual_seed(0)
    noise = agents.agent.draw_act_noise(generator, len(obs))
    both = lambda x: torch.stack([x, x])
    expected = agents.function(method)(both(obs), both(noise)).numpy()  # (2, N, A)
    assert not np.array_equal(expected[0], expected[1])
    for directory in (run_dir, run_dir / "policy", folder):
        for seed in (0, 1):
            policy = module.load(directory, seed)
            actions = policy.act(obs.numpy())
            assert actions.shape == (3, 2) and np.abs(actions).max() <= 1
            np.testing.assert_allclose(actions, expected[seed], rtol=0, atol=1e-6)  # one seed, not two side by side
            assert policy.act(obs[0].numpy()).shape == (2,)
            policy.generator.manual_seed(0)
            assert np.array_equal(policy.act(obs.numpy()), actions)
    for directory in (run_dir, folder):  # both seeds side by side, as in training: the same bits
        saved = export.read_any(directory, "--evaluate")
        args = module.Args(**{key: value for key, value in saved["args"].items()})
        loaded = policies.rebuild(module.Agent, args, saved, torch.device("cpu"), directory)
        assert np.array_equal(loaded.function(method)(both(obs), both(noise)).numpy(), expected)


def test_one_seed_of_many(exported, tmp_path):
    run_dir, folder = exported["q_flow"]
    run("q_flow", "--evaluate", run_dir, "--eval-episodes", 1, "--export", tmp_path / "one", "--export-seed", 1)
    (run_dir / "inference.csv").unlink()
    weights = safetensors.torch.load_file(tmp_path / "one/policy.safetensors")
    of_both = safetensors.torch.load_file(folder / "policy.safetensors")
    assert weights.keys() == of_both.keys()
    for name, value in weights.items():
        assert torch.equal(value, of_both[name][1:2]) and name.startswith("actor_flow.")
    import q_flow

    obs = observations().numpy()
    assert q_flow.load(tmp_path / "one").args.seed == 1
    assert np.array_equal(q_flow.load(tmp_path / "one").act(obs), q_flow.load(folder, seed=1).act(obs))
    with pytest.raises(SystemExit):
        q_flow.load(tmp_path / "one", seed=0)


def make_saved(agents, name, args):
    """What a checkpoint has of agents in a maze."""
    saved = agents.state_dict() | {"algorithm": name, "args": vars(args), "step": args.total_timesteps}
    saved["agent_inputs"] = {"obs_dim": 2, "action_dim": 2, "min_reward": -1.0, "max_reward": 0.0}
    saved["dataset"] = {"file": "x.npz", "source": "generated", "transitions": 1, "sha256": "0"}
    return saved


def test_a_run_exports_the_evaluation_of_its_last_step_alone(tmp_path):
    args = small_args("q_flow", env_id=ENV_ID, num_seeds=2, total_timesteps=20)
    checkpoint.save(tmp_path, make_saved(make_agents(args, (0, 1), obs_dim=2, action_dim=2), "q_flow", args))
    rows = [f"{step},{seed},offline,0.{step + seed},-9.0,8.0,7\n" for step in (10, 20, 120) for seed in (0, 1)]
    header = "step,seed,phase,success,episode_return,episode_length,episodes\n"
    (tmp_path / "eval.csv").write_text("".join([header, *rows]))
    export.write_run(tmp_path, ALGORITHMS["q_flow"].Agent)
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert [(row["step"], row["seed"], row["success"]) for row in config["evaluation"]] == [(20, 0, 0.2), (20, 1, 0.21)]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_each_of_eight_seeds_acts_as_itself(name, tmp_path):
    args = small_args(name, env_id=ENV_ID, num_seeds=8, seed=3)
    agents = make_agents(args, range(3, 11), obs_dim=2, action_dim=2)
    saved = make_saved(agents, name, args)
    export.write(tmp_path, EVERY[name].Agent, saved, [])
    obs = observations()
    noise = agents.agent.draw_act_noise(torch.Generator().manual_seed(0), len(obs))
    seen = []
    for i, seed in enumerate(range(3, 11)):
        expected = agents.only(i).function("act")(obs[None], noise[None])[0].numpy()
        seen.append(EVERY[name].load(tmp_path, seed).act(obs.numpy()))
        assert np.array_equal(seen[-1], expected)
    assert len({actions.tobytes() for actions in seen}) == 8
    with pytest.raises(SystemExit):
        EVERY[name].load(tmp_path, 11)


def test_a_policy_of_a_gpu_run_is_written_for_any_device(online_runs, tmp_path, monkeypatch):
    """A stand-in for weights on a GPU: tensors of another device class, which only `.cpu()` brings here."""
    saved = checkpoint.load(online_runs["floq"])
    asked = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: asked.append(self.shape) or self)
    export.write(tmp_path, ALGORITHMS["floq"].Agent, saved, [])
    assert len(asked) == sum(name.startswith("actor_onestep_flow") for name in saved["agent"])
    assert "has not been evaluated" in (tmp_path / "README.md").read_text()


OF_THE_MACHINE = set(
    "resume evaluate export export_seed runs_dir dataset_dir dataset_path track wandb_entity wandb_project_name "
    "eval_workers".split()
)


def test_a_folder_holds_no_place_of_the_machine(exported):
    for name, (_, folder) in exported.items():
        args = json.loads((folder / "config.json").read_text())["args"]
        assert not OF_THE_MACHINE & set(args) and "/" not in "".join(map(str, args.values()))
        assert not any(f"{argument} =" in (folder / "README.md").read_text() for argument in OF_THE_MACHINE)
        assert {path.name for path in folder.iterdir()} >= {"policy.safetensors", "config.json", "README.md"}
        card = (folder / "README.md").read_text()
        assert f"{name}.load(" in card and "2 episodes per seed" in card and ENV_ID in card


def test_sizes(tmp_path):
    """Below 3 MB at quick size, below 25 MB at published size, per seed."""
    for name in NAMES:
        module = ALGORITHMS[name]
        for size, args in (("quick", module.Args(**module.QUICK)), ("published", module.Args())):
            agent = module.Agent(args, 28, 5, -1.0, 0.0)
            saved = {"agent": {key: p.detach()[None] for key, p in agent.named_parameters()}}
            saved |= {"algorithm": name, "args": vars(args), "agent_inputs": {}, "step": 1}
            saved["dataset"] = {"file": "x.npz", "source": "generated", "transitions": 1, "sha256": "0"}
            export.write(tmp_path, module.Agent, saved, [])
            megabytes = sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e6
            assert megabytes < (3 if size == "quick" else 25), (name, size, megabytes)


# --- What is refused ---


def test_what_is_no_policy_is_refused(exported, tmp_path):
    run_dir, folder = exported["floq"]
    assert_refused("floq", ["--evaluate", tmp_path], "--evaluate", "has no usable checkpoint")
    assert_refused("q_flow", ["--evaluate", folder], "--evaluate", "is a run of floq.py")
    assert_refused("floq", ["--evaluate", folder, "--gamma", "0.9"], "--gamma 0.9 (the run has 0.99)")
    assert_refused("floq", ["--evaluate", folder, "--resume", run_dir], "--resume and --evaluate exclude each other")
    assert_refused("floq", ["--resume", folder], "has no usable checkpoint")
    assert_refused("floq", ["--export", tmp_path / "x"], "--export", "--evaluate")
    assert_refused("floq", ["--evaluate", run_dir, "--export-seed", 1], "--export-seed", "--export")
    words = ["--evaluate", run_dir, "--export", tmp_path / "x", "--export-seed", 4]
    assert_refused("floq", words, "--export-seed 4: the run has seeds 0 to 1")
    (tmp_path / "file").touch()
    words = ["--evaluate", run_dir, "--export", tmp_path / "file"]
    assert_refused("floq", words, f"--export {tmp_path}/file is not writable: {tmp_path}/file is not a directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/policy.safetensors.part").touch()  # what a killed write leaves
    assert export.check(tmp_path / "other", checkpoint.load(run_dir)) == [0, 1]
    (tmp_path / "other/README.md").write_text("mine")
    before = (run_dir / "inference.csv").read_bytes()
    words = ["--evaluate", run_dir, "--export", tmp_path / "other"]
    assert_refused("floq", words, "the folder holds something else")
    assert (tmp_path / "other/README.md").read_text() == "mine"
    assert (run_dir / "inference.csv").read_bytes() == before  # refused before it was evaluated
    with open(tmp_path / "other/inference.csv", "w") as file:
        file.write("num_actions,episodes_seed,step\n")  # of a version without this setting
    shutil.copytree(exported["q_flow"][1], tmp_path / "old", ignore=shutil.ignore_patterns("inference.csv"))
    shutil.copy(tmp_path / "other/inference.csv", tmp_path / "old")
    assert_refused("q_flow", ["--evaluate", tmp_path / "old"], "does not begin with flow_steps,episodes_seed")
    import q_flow

    with pytest.raises(SystemExit) as error:
        q_flow.load(folder)
    assert error.value.code == 2


def damage_weights(change):
    def damage(folder):
        path = folder / "policy.safetensors"
        weights = safetensors.torch.load_file(path)
        change(weights)
        path.write_bytes(safetensors.torch.save(weights))

    return damage


def damage_config(change):
    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return damage


FIRST = "actor_onestep_flow.weights.0"
DAMAGES = {
    "missing tensor": (damage_weights(lambda w: w.pop(FIRST)), FIRST),
    "surplus tensor": (damage_weights(lambda w: w.update(more=torch.zeros(2))), "more"),
    "wrong shape": (damage_weights(lambda w: w.update({FIRST: w[FIRST][..., :-1].contiguous()})), FIRST),
    "not finite": (damage_weights(lambda w: w[FIRST].view(-1)[:1].fill_(float("nan"))), "not finite"),
    "cut off": (
        lambda folder: (folder / "policy.safetensors").write_bytes((folder / "policy.safetensors").read_bytes()[:-50]),
        "policy.safetensors cannot be read",
    ),
    "no weights": (lambda folder: (folder / "policy.safetensors").unlink(), "policy.safetensors cannot be read"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json has no proper"),
    "no step": (damage_config(lambda c: c.pop("step")), "config.json has no proper step"),
    "unknown environment": (damage_config(lambda c: c["args"].update(env_id="moon-v0")), "moon-v0 is unknown"),
    "widths no numbers": (damage_config(lambda c: c["args"].update(actor_hidden_dims="wide")), "is no tuple"),
    "no gamma": (damage_config(lambda c: c["args"].update(gamma=None)), "gamma = None, which is no float"),
    "seed no number": (damage_config(lambda c: c["args"].update(seed="x")), "seed = 'x', which is no int"),
    "other dimensions": (damage_config(lambda c: c["agent_inputs"].update(obs_dim=9)), FIRST),
    "no dimensions": (damage_config(lambda c: c["agent_inputs"].clear()), "do not fit floq.py"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, exported, tmp_path, capsys):
    change, message = DAMAGES[damage]
    shutil.copytree(exported["floq"][1], tmp_path / "folder")
    change(tmp_path / "folder")
    import floq

    with pytest.raises(SystemExit) as error:
        floq.load(tmp_path / "folder")
    shown = capsys.readouterr().err
    assert error.value.code == 2 and message in shown and len(shown.strip().splitlines()) == 1, shown


def test_a_policy_of_another_version_is_refused_by_the_names_of_its_arguments(exported, tmp_path, capsys):
    folder = shutil.copytree(exported["q_flow"][1], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["alpha"]  # from before a flag existed: it has that flag's default
    (folder / "config.json").write_text(json.dumps(config))
    assert ALGORITHMS["q_flow"].load(folder).args.alpha == ALGORITHMS["q_flow"].Args().alpha
    config["args"] |= {"old_flag": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused("q_flow", ["--evaluate", folder], "is of another version of q_flow.py, which had old_flag")
    with pytest.raises(SystemExit) as stop:
        ALGORITHMS["q_flow"].load(folder)
    assert stop.value.code == 2 and "which had old_flag" in capsys.readouterr().err


def test_a_damaged_folder_is_refused_by_the_command(exported, tmp_path):
    shutil.copytree(exported["floq"][1], tmp_path / "folder")
    DAMAGES["missing tensor"][0](tmp_path / "folder")
    assert_refused("floq", ["--evaluate", tmp_path / "folder"], "do not fit floq.py", FIRST)


# --- The policies in the repository ---

FOLDERS = sorted(path.parent for path in (ROOT / "benchmarks/policies").glob("*/config.json"))


def test_the_policies_of_the_repository_are_small_and_one_per_algorithm():
    algorithms = [json.loads((folder / "config.json").read_text())["algorithm"] for folder in FOLDERS]
    assert sorted(algorithms) == ["evor", "floq", "q_flow", "value_flows"]
    files = [folder / name for folder in FOLDERS for name in (export.WEIGHTS, export.CONFIG, export.CARD)]
    assert sum(path.stat().st_size for path in files) < 4e6


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_a_policy_of_the_repository_acts_and_its_card_is_its_config(folder):
    config = json.loads((folder / "config.json").read_text())
    policy = ALGORITHMS[config["algorithm"]].load(folder)
    observation = np.linspace(-1, 1, config["agent_inputs"]["obs_dim"])
    first, second = policy.act(observation), policy.act(observation)
    assert first.shape == (5,) and not np.array_equal(first, second) and np.abs([first, second]).max() <= 1
    assert (folder / "README.md").read_text() == export.card(config)
    assert "/" not in "".join(str(value) for value in config["args"].values())
