"""Every file parses with the oldest Python that the README names; the first test, since nothing else would tell."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common import check_system


def test_every_file_parses_on_python_3_10(tmp_path):
    """ruff knows each version's syntax (`target-version` in ruff.toml); `ast.parse(feature_version=...)` does not."""
    check = [sys.executable, "-m", "ruff", "check", "--select", "E9", "--no-cache", "--config", str(ROOT / "ruff.toml")]
    done = subprocess.run([*check, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    newer = tmp_path / "newer.py"
    newer.write_text("def f(table, key):\n    return table[*key, 0]\n")  # 3.11's syntax
    assert subprocess.run([*check, str(newer)], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    "system, message",
    [
        (dict(platform="win32"), "Linux and macOS, not on Windows"),
        (dict(version=(3, 9, 1)), "Python 3.9: CleanFlow runs on 3.10 to 3.13"),
        (dict(version=(3, 14, 0)), "Python 3.14: CleanFlow runs on 3.10 to 3.13"),
        (
            dict(packages=("torch", "no_such_package")),
            "no_such_package is not installed; pip install -r requirements.txt",
        ),
    ],
)
def test_a_system_without_support_is_told_so(system, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        check_system(**system)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_requirements_pin_everything_but_what_nobody_needs():
    lines = [line.split("#")[0].strip() for name in ("requirements.txt", "requirements-no-deps.txt")
             for line in (ROOT / name).read_text().splitlines()]  # fmt: skip
    lines = [line for line in lines if line]
    assert all("==" in line for line in lines) and not any("labmaze" in line for line in lines)
    pins = re.findall(
        r'^    "(.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )  # Python 3.10 has no tomllib
    assert len(pins) > 10 and {"torch", "ogbench"} < {pin.split("==")[0] for pin in pins} and set(pins) <= set(lines)
    installed = "pip install -r requirements.txt && pip install --no-deps -r requirements-no-deps.txt"
    assert (ROOT / "README.md").read_text().count(installed) == 1
