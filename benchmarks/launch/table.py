"""What the user sees: a table of all jobs, or a line per change, and at last which jobs failed."""

import contextlib
import shutil
import sys

from benchmarks.tables import aligned

HEADER = ("method", "environment", "seeds", "state", "step", "success", "updates/s", "restarts", "")
NUMBERS = {4, 5, 6, 7}  # columns that are aligned to the right
ORDER = ("failed", "running", "waiting", "done", "skipped")  # which jobs a short table shows first


def cells(job):
    """A job's row of the table."""
    seeds = "-".join(map(str, dict.fromkeys((job.seeds[0], job.seeds[-1]))))
    success = "" if job.success is None else f"{job.success:.2f}"
    rate = "" if job.rate is None else f"{job.rate:.4g}"
    step = f"{job.step:,}/{sum(job.lengths):,}"
    return job.file.stem, job.env_id, seeds, job.state, step, success, rate, str(job.restarts), job.note


def table(jobs, height=None):
    """The table of all jobs as lines; with `height`, at most so many: the ended jobs are left out first."""
    states = [job.state for job in jobs]
    summary = f"{len(jobs)} jobs: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    shown = range(len(jobs))
    if height is not None and len(jobs) > height - 3:
        shown = sorted(sorted(shown, key=lambda i: ORDER.index(states[i]))[: max(1, height - 3)])
        summary += f" ({len(jobs) - len(shown)} not shown)"
    return aligned([HEADER, *(cells(jobs[i]) for i in shown)], NUMBERS) + [summary]


def line(job):
    """A job's line where there is no table."""
    method, env_id, seeds, state, step, success, rate, _, note = cells(job)
    parts = {"step {}": step, "success {}": success, "{} updates/s": rate, "restarts {}": job.restarts}
    known = ", ".join(text.format(value) for text, value in parts.items() if value)
    return f"{method} {env_id} seeds {seeds}: {state}{note and f' ({note})'}, {known}"


class Screen:
    """Shows the table: redrawn in place on a terminal, else a line for every job whose state or success has changed."""

    def __init__(self, jobs):
        self.jobs, self.lines, self.known = jobs, [], {}

    def draw(self):
        """Shows what has changed."""
        known, self.known = self.known, {job: (job.state, job.success, job.restarts, job.note) for job in self.jobs}
        if sys.stdout.isatty():
            columns, height = shutil.get_terminal_size()
            lines = [text[: columns - 1] for text in table(self.jobs, height)]
            if lines != self.lines:
                self.say((f"\033[{len(self.lines)}F\033[J" if self.lines else "") + "\n".join(lines))
                self.lines = lines
        else:
            for job in self.jobs:
                if self.known[job] != known.get(job):
                    self.say(line(job))

    def say(self, text):
        """Prints above the next table. Where that fails (a full disk, a closed terminal), the jobs matter more."""
        self.lines = []
        with contextlib.suppress(OSError):
            print(text, flush=True)


def report_failures(jobs):
    """Names the jobs given up, with the end of their stderr and their logs; returns the exit code."""
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        path, lines = job.folder / "stderr.log", []
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace")[-20_000:].split("\n")
        lines = [text.strip().split("\r")[-1] for text in lines if text.strip()]  # of a progress bar its end only
        method, env_id, seeds, *_ = cells(job)
        text = [f"failed: {method} {env_id} seeds {seeds}: {job.note}", *lines[-5:], f"log: {path}"]
        print("\n    ".join(text), file=sys.stderr)
    return 1 if failed else 0
