"""Published against measured scores: tables, a verdict each, learning curves.

    python -m benchmarks.report              # print the tables of what is in benchmarks/results
    python -m benchmarks.report --write      # and renew README.md, docs/benchmarks.md, its pictures and report.csv
    python -m benchmarks.report --check      # exit code 1 if a verdict got worse than the one in report.csv

A score follows the paper's rule (offline: the mean of the last three evaluations), then the mean over seeds. A verdict
rests on the interval of the difference to the published score (`benchmarks.scores.verdict`). Runs whose settings are
not the published ones are listed as reduced and get none. Unfinished runs are shown so far and get none either.
Official and generated data are never put together.
"""

import dataclasses
import importlib
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import scores, tables
from benchmarks.tables import markdown
from common import arguments, fail
from common.curves import draw as draw_curve
from common.runs import write_text

REPOSITORY = scores.ROOT.parent
TITLES = {"floq": "floq", "value_flows": "Value Flows", "q_flow": "Q-Flow", "evor": "EVOR"}
BASELINES = {"fql": "FQL", "c51": "C51", "iqn": "IQN", "codac": "CODAC"}
PICTURE_TASKS = 30  # panels of a picture at most

# A verdict gets worse when it goes down in this order.
RANK = {"not run": 0, "below": 1, "undecided": 2, "reproduced": 3, "above": 3}

COLUMNS = [
    "method", "env_id", "protocol", "source", "changed", "seeds", "score", "std", "half", "last", "best", "reported",
    "reported_std", "reported_seeds", "reported_kind", "difference", "difference_half", "verdict",
]  # fmt: skip


@dataclass
class ReportArgs:
    results: str = str(scores.ROOT / "results")
    """directory of the collected runs; its report.csv is what --check compares with"""
    reported: str = str(scores.ROOT / "reported.csv")
    """published scores"""
    methods: tuple[str, ...] = scores.METHODS
    """methods that are printed"""
    write: bool = False
    """renew report.csv there, and the tables and pictures below --docs"""
    check: bool = False
    """exit code 1 if a verdict is worse than the stored one"""
    docs: str = str(REPOSITORY)
    """directory of README.md and docs/ for --write"""
    output: str | None = None
    """also write the rows to this csv file"""


# --- Rows ---


def summarize(curves_and_protocols, reported=None):
    """One row's statistics over the seeds of one or more runs of the same kind.

    Args:
        curves_and_protocols: [(curves as of scores.read_evaluations, protocol)], a run each.
        reported: the published score, or None.

    Returns:
        {samples, seeds, score, half, last, best, difference, difference_half, verdict}: `samples` the scores by seed,
        `last` the mean of the last evaluation, `best` of each seed's best one (it is chosen by its outcome: not a
        score).
    """
    samples, last, best = [], [], []
    for curves, protocol in curves_and_protocols:
        samples += scores.seed_scores(curves, protocol).values()
        for curve in curves[scores.PROTOCOLS[protocol][0]].values():
            last.append(curve[max(curve)])
            best.append(max(curve.values()))
    return statistics(samples, reported) | {"last": np.mean(last), "best": np.mean(best)}


def statistics(samples, reported):
    """The part of a row that follows from the seeds' scores and the published one."""
    mean, half = scores.interval(samples)
    std = np.std(samples, ddof=1) if len(samples) > 1 else np.nan
    row = {"samples": samples, "seeds": len(samples), "score": mean, "std": std, "half": half}
    if reported is not None:
        row["difference"], row["difference_half"] = scores.difference(samples, reported)
        row["verdict"] = scores.verdict(samples, reported)
    return row


def make_rows(runs, reported):
    """Rows of the report, one for each method, task (or five tasks together), protocol, kind of data and settings.

    Args:
        runs: of scores.read_results.
        reported: of scores.read_reported.

    Returns:
        list of {COLUMNS..., samples, members}, sorted; `changed` is empty for published settings, `members` are a
        measured row's runs. A published score without a run is a row with the verdict `not run`. Unfinished runs are
        in no row.
    """
    groups = defaultdict(list)
    for run in (run for run in runs if not run["unfinished"]):
        for protocol in run["protocols"]:
            groups[run["method"], run["env_id"], protocol, run["source"], json.dumps(run["changed"])].append(run)
    rows = []
    for (method, env_id, protocol, source, changed), members in groups.items():
        changed = json.loads(changed)
        paths = {}
        for run in members:
            for seed in run["seeds"]:
                if seed in paths:  # of other generated data with as many episodes
                    twice = f"{paths[seed]} and {run['path']} are runs of seed {seed} with the same settings"
                    fail(f"{twice} and different data, which one row cannot hold; remove one")
                paths[seed] = run["path"]
        published = None if changed else reported.get((method, env_id, protocol))
        row = summarize([(run["curves"], protocol) for run in members], published)
        row |= {"method": method, "env_id": env_id, "protocol": protocol, "source": source, "changed": changed}
        rows.append(row | {"members": members} | reported_columns(published))
    rows += environment_rows(rows, reported)
    there = {(row["method"], row["env_id"], row["protocol"]) for row in rows if not row["changed"]}
    for (method, env_id, protocol), published in reported.items():
        compared = method in scores.METHODS and protocol in scores.PROTOCOLS and published["tasks"] in (1, 5)
        if compared and (method, env_id, protocol) not in there:
            row = {"method": method, "env_id": env_id, "protocol": protocol, "source": "official", "changed": {}}
            rows.append(row | {"verdict": "not run", "samples": []} | reported_columns(published))
    order = lambda row: (scores.METHODS.index(row["method"]), row["env_id"], row["protocol"], row["source"])
    return [{name: None for name in COLUMNS} | row for row in sorted(rows, key=order)]


def environment_rows(rows, reported):
    """Rows of five tasks together: each seed's mean over the tasks, where all five were run with published settings."""
    tasks = defaultdict(dict)
    for row in rows:
        if not row["changed"] and "-singletask-task" in row["env_id"]:
            key = row["method"], scores.environment(row["env_id"]), row["protocol"], row["source"]
            tasks[key][row["env_id"]] = row
    together = []
    for (method, name, protocol, source), parts in tasks.items():
        if len(parts) < 5:
            continue
        by_seed = [
            {s: v for run in part["members"] for s, v in scores.seed_scores(run["curves"], protocol).items()}
            for part in parts.values()
        ]
        common = sorted(set.intersection(*map(set, by_seed)))
        if not common:
            continue
        published = reported.get((method, name, protocol))
        samples = [np.mean([part[seed] for part in by_seed]) for seed in common]
        row = {"method": method, "env_id": name, "protocol": protocol, "source": source, "changed": {}}
        together.append(row | statistics(samples, published) | reported_columns(published))
    return together


def unfinished_rows(runs):
    """A row for each unfinished run, in its present phase, whose last update is `length`.

    Returns:
        list of {method, env_id, protocol, source, changed, members, length}.
    """
    rows = []
    for run in (run for run in runs if run["unfinished"]):
        args = run["info"]["args"]
        steps = scores.evaluation_steps(args)
        protocol = next(p for p in reversed(run["protocols"]) if all(run["curves"][scores.PROTOCOLS[p][0]].values()))
        row = {name: run[name] for name in ("method", "env_id", "source", "changed")}
        rows.append(row | {"protocol": protocol, "members": [run], "length": max(steps[scores.PROTOCOLS[protocol][0]])})
    return rows


def reported_columns(published):
    """The columns of a published score, empty without one."""
    if published is None:
        return {}
    return {"reported" + (f"_{key}" if key else ""): published[name] for key, name in
            (("", "mean"), ("std", "std"), ("seeds", "num_seeds"), ("kind", "kind"))}  # fmt: skip


def csv_text(rows):
    """The rows as csv; a float has two decimals, so that the same results give the same file everywhere."""

    def cell(name, value):
        if name == "changed":
            return " ".join(sorted(value))
        if isinstance(value, (float, np.floating)):
            return "" if np.isnan(value) else f"{value:.2f}"
        return value  # None is written as nothing

    return tables.csv_text([{name: cell(name, row[name]) for name in COLUMNS} for row in rows], COLUMNS)


# --- Check ---


def worse_verdicts(rows, stored):
    """Lines that say which verdicts are worse than the stored ones: [] if none is.

    Args:
        rows: of make_rows.
        stored: path of an earlier report.csv.

    Raises:
        SystemExit: (code 2) if the file is missing, malformed or names an unknown verdict.
    """
    now = {verdict_key(row): row["verdict"] for row in rows if row["verdict"]}
    lines = []
    for line, row in tables.read_exactly(stored, COLUMNS):
        if not row["verdict"]:
            continue
        if row["verdict"] not in RANK:
            fail(f"{stored}:{line}: unknown verdict {row['verdict']!r}; known: {', '.join(RANK)}")
        verdict = now.get(verdict_key(row), "not run")
        if RANK[verdict] < RANK[row["verdict"]]:
            lines.append(f"{' '.join(verdict_key(row))}: {verdict}, was {row['verdict']}")
    return lines


def verdict_key(row):
    """What a verdict is about."""
    return row["method"], row["env_id"], row["protocol"], row["source"]


# --- Tables ---

NOT_YET = "No run of published size has ended yet, for any of the four methods."
SO_FAR = "published_so_far.png"
NOTES = (
    "Scores are success in percent; +- is the standard deviation over the seeds, their number in brackets. "
    "An interval in square brackets has 95%."
)


def cell(mean, spread, number=None):
    """`95 +- 3 (8)`; an empty cell for None."""
    if mean is None:
        return ""
    spread = "" if spread is None or np.isnan(spread) else f" +- {spread:.0f}"
    return f"{mean:.0f}{spread}" + (f" ({number})" if number else "")


def bounds(middle, half):
    """`-3 [-9, 3]`; an empty cell for None."""
    if middle is None:
        return ""
    low, middle, high = (x if np.isnan(x) else round(x) for x in (middle - half, middle, middle + half))
    return f"{middle}" + ("" if np.isnan(half) else f" [{low}, {high}]")


def unit(env_id):
    """What a score is of: one task, or an environment's five."""
    return "task" if "-singletask-task" in env_id else "environment"


def published_table(reported):
    """The published scores of environments, a row each, that our methods and the baselines have."""
    methods = (*scores.METHODS[:3], *BASELINES)  # EVOR has no score of an environment
    keys = {key[1:]: None for key, row in reported.items() if row["tasks"] == 5 and key[2] in scores.PROTOCOLS}
    lines = []
    for env_id, protocol in sorted(keys, key=lambda key: (key[1], key[0])):
        cells = [reported.get((method, env_id, protocol)) for method in methods]
        cells = [cell(row["mean"], row["std"], row["num_seeds"]) if row else "" for row in cells]
        lines.append([env_id, protocol, *cells])
    titles = TITLES | BASELINES
    return markdown(["environment", "protocol", *(titles[method] for method in methods)], lines)


def comparison_table(rows, reported, method):
    """A method's runs of published settings, by kind of data, beside its published scores and FQL's."""
    tasks = defaultdict(dict)
    for row in rows:
        if row["method"] == method and row["samples"] and not row["changed"]:
            tasks[row["env_id"], row["protocol"]][row["source"]] = row
    lines = []
    for (env_id, protocol), by_source in tasks.items():
        line = [env_id + (" (5 tasks)" if unit(env_id) == "environment" else ""), protocol]
        for name in (method, "fql"):
            published = reported.get((name, env_id, protocol))
            line.append(cell(published["mean"], published["std"], published["num_seeds"]) if published else "")
        for source in ("official", "generated"):
            row = by_source.get(source, {})
            line.append(cell(row.get("score"), row.get("std"), row.get("seeds")))
            line.append(bounds(row.get("difference"), row.get("difference_half")))
            line.append(row.get("verdict") or "")
        lines.append(line)
    header = ["environment", "protocol", "published", "FQL, published", "official data", "difference", "verdict"]
    return markdown([*header, "generated data", "difference", "verdict"], lines)


def reduced_table(rows):
    """Runs that are not the published configuration."""
    lines = []
    for row in rows:
        if not row["changed"]:
            continue
        info = row["members"][0]["info"]
        args, data = info["args"], info["dataset"]
        lines.append([
            TITLES[row["method"]], row["env_id"], row["protocol"], f"{row['source']}, {data['transitions']:,}",
            f"{args['total_timesteps']:,}" + (f" + {args['online_timesteps']:,}" if args["online_timesteps"] else ""),
            args["eval_episodes"], cell(row["score"], row["std"], row["seeds"]), cell(row["last"], None),
            cell(row["best"], None), len(row["changed"]),
        ])  # fmt: skip
    header = ["method", "environment", "protocol", "data, transitions", "updates", "episodes", "score", "last", "best"]
    return markdown([*header, "settings changed"], lines)


def iqm_table(rows):
    """Interquartile means over the tasks of a method's runs of published settings, with bootstrap intervals."""
    groups = defaultdict(list)
    for row in rows:
        if row["samples"] and not row["changed"] and unit(row["env_id"]) == "task":
            groups[row["method"], row["protocol"], row["source"]].append(row["samples"])
    lines = []
    for (method, protocol, source), samples in groups.items():
        mean, low, high = scores.iqm(samples)
        limits = "" if np.isnan(low) else f"[{low:.0f}, {high:.0f}]"
        lines.append([TITLES[method], protocol, source, len(samples), f"{mean:.0f}", limits])
    return markdown(["method", "protocol", "data", "tasks", "IQM", "95% interval"], lines)


def verdict_table(rows):
    """How many published scores of each method have which verdict, tasks and environments apart."""
    lines = []
    for method in scores.METHODS:
        for source in ("official", "generated"):
            for kind in ("environment", "task"):
                verdicts = [
                    row["verdict"]
                    for row in rows
                    if (row["method"], row["source"], unit(row["env_id"])) == (method, source, kind)
                ]
                counts = [verdicts.count(name) for name in RANK]
                if any(counts):
                    lines.append([TITLES[method], source, kind + "s", *counts])
    return markdown(["method", "data", "scores of", *RANK], lines)


def unfinished_table(rows, reported):
    """How far unfinished runs are, and their last evaluations; `rows` of unfinished_rows."""
    lines = []
    for row in rows:
        (run,) = row["members"]
        info, curves = run["info"], run["curves"][scores.PROTOCOLS[row["protocol"]][0]].values()
        step = max(map(max, curves))
        published = None if row["changed"] else reported.get((row["method"], row["env_id"], row["protocol"]))
        lines.append([
            TITLES[row["method"]], row["env_id"], f"{row['source']}, {info['dataset']['transitions']:,}",
            f"{step:,} of {row['length']:,}", f"{sum(info['seconds'].values()) / 3600:.1f}",
            cell(np.mean([curve[step] for curve in curves]), None, len(curves)),
            cell(published["mean"], published["std"], published["num_seeds"]) if published else "",
        ])  # fmt: skip
    header = ["method", "environment", "data, transitions", "updates so far", "hours", "success in the last evaluation"]
    return markdown([*header, "published, at the end"], lines)


def run_command(info):
    """The command that repeats a run; the settings that --env-id alone gives are left out."""
    args, words = info["args"], f"python {info['algorithm']}.py --env-id {info['args']['env_id']}"
    if info["dataset"]["source"] == "generated":  # where --dataset-path named the file, too
        args = args | {"dataset_source": "generated"}
    defaults = dataclasses.asdict(importlib.import_module(info["algorithm"]).Args())
    always = ["online_timesteps", "seed", "num_seeds", "dataset_source", "eval_interval"]
    names = [name for name in always if args[name] != defaults[name]]
    names += [name for name in info["changed"] if name in defaults and name not in ("env_id", *names)]
    return " ".join([words, *arguments.as_flags({name: args[name] for name in names})])


def measured_text(rows, reported):
    """Verdicts, tables and interquartile means of the runs of published settings; one sentence where there is none."""
    measured = [row for row in rows if row["samples"] and not row["changed"]]
    if not measured:
        return NOT_YET + "\n"
    methods = [method for method in scores.METHODS if any(row["method"] == method for row in measured)]
    text = [NOTES, verdict_table(rows).rstrip()]
    for method in methods:
        text += [f"### {TITLES[method]}", comparison_table(rows, reported, method).rstrip()]
    text += ["### Interquartile means", iqm_table(rows).rstrip()]
    return "\n\n".join(text) + "\n"


def documents(rows, unfinished, reported):
    """{path below the repository: {block name: markdown}}: what --write puts between a file's markers."""
    any_measured = any(row["samples"] and not row["changed"] for row in rows)
    summary = "Published scores by verdict:\n\n" + verdict_table(rows) if any_measured else NOT_YET + "\n"
    measured = measured_text(rows, reported)
    if unfinished:
        commands = "\n".join(run_command(row["members"][0]["info"]) for row in unfinished)
        summary += f"\n![success so far](docs/{SO_FAR})\n"
        measured += f"\nUnfinished:\n\n{unfinished_table(unfinished, reported)}\n![success so far]({SO_FAR})\n"
        measured += f"\n```\n{commands}\n```\n"
    complete = {"published": published_table(reported), "measured": measured, "reduced": reduced_table(rows)}
    return {"README.md": {"results": summary}, "docs/benchmarks.md": complete}


def insert(text, name, block, path):
    """The text with what stands between the markers `<!-- name: begin -->` and `<!-- name: end -->` replaced."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        fail(f"{path} needs the lines {begin.strip()} and {end} once each, for the table between them")
    before, rest = text.split(begin)
    return before + begin + "\n" + block + "\n" + end + rest.split(end)[1]


# --- Pictures ---


def draw_curves(path, rows, reported):
    """Saves learning curves: a panel per row, a thin line per seed, the published score as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    size = (max(6.4, 4.2 * columns), 3.2 * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, row in zip(panels.flat, rows):
        phase = scores.PROTOCOLS[row["protocol"]][0]
        measured = [curve for run in row["members"] for curve in run["curves"][phase].values()]
        seeds = f"{len(measured)} seeds" if len(measured) > 1 else "1 seed"
        draw_curve(axes, measured, f"here, {row['source']} data, {seeds}")
        for name, label in ((row["env_id"], "published"), (scores.environment(row["env_id"]), "published, five tasks")):
            published = None if row["changed"] else reported.get((row["method"], name, row["protocol"]))
            if published:
                spread = published["std"] or 0.0
                axes.axhspan(published["mean"] - spread, published["mean"] + spread, color="tab:orange", alpha=0.2)
                axes.axhline(published["mean"], color="tab:orange", label=label)
                break
        title = row["env_id"].removesuffix("-v0").replace("-singletask", "")
        title += f", {row['protocol']}" if row["protocol"].startswith("online") else ""
        if row.get("length"):  # an unfinished run: its panel has room for all of it
            axes.set_xlim(right=row["length"])
            title = f"{TITLES[row['method']]}: {title}, so far"
        axes.set_title(title + (" (reduced run)" if row["changed"] else ""), fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k
        axes.locator_params(axis="x", nbins=5)
        axes.legend(fontsize="small")
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("success (%)")
    figure.savefig(path, dpi=100)


# --- Main ---


def main(args):
    """Prints the report; see the module's docstring for the files."""
    for method in args.methods:
        if method not in scores.METHODS:
            fail(f"--methods {method}: unknown; known: {', '.join(scores.METHODS)}")
    if not Path(args.results).is_dir():
        fail(f"--results {args.results} is not a directory")
    reported = scores.read_reported(args.reported)
    runs = scores.read_results(args.results)
    rows, unfinished = make_rows(runs, reported), unfinished_rows(runs)
    stored = Path(args.results) / "report.csv"
    worse = worse_verdicts(rows, stored) if args.check else []

    printed = [row for row in rows if row["method"] in args.methods]
    so_far = unfinished_table([row for row in unfinished if row["method"] in args.methods], reported)
    tables = {"Published settings": measured_text(printed, reported), "Unfinished runs": so_far}
    tables["Reduced runs"] = reduced_table(printed)
    print("\n".join(f"{title}\n\n{table}" for title, table in tables.items()))
    if args.output is not None:
        write_text(Path(args.output), csv_text(rows))
    if args.write:
        for name, blocks in documents(rows, unfinished, reported).items():
            path = Path(args.docs) / name
            if not path.is_file():
                fail(f"--docs {args.docs} has no {name}")
            text = path.read_text()
            for block, content in blocks.items():
                text = insert(text, block, content, path)
            write_text(path, text)
        for method in scores.METHODS:
            drawn = [row for row in rows if row["method"] == method and row.get("members")]
            if drawn:
                draw_curves(Path(args.docs) / "docs" / f"results_{method}.png", drawn[:PICTURE_TASKS], reported)
        if unfinished:
            draw_curves(Path(args.docs) / "docs" / SO_FAR, unfinished[:PICTURE_TASKS], reported)
        write_text(stored, csv_text(rows))
        print(f"written: {stored}, README.md, docs/benchmarks.md and its pictures")
    if worse:
        print("verdicts that got worse:\n  " + "\n  ".join(worse), file=sys.stderr)
        raise SystemExit(1)
    if args.check:
        print(f"no verdict is worse than in {stored}")


if __name__ == "__main__":
    main(tyro.cli(ReportArgs, description=__doc__))
