"""Every file parses with the oldest Python that the README names; the first test, since nothing else would tell."""

import subprocess
import sys

from conftest import ROOT


def test_every_file_parses_on_python_3_10(tmp_path):
    """ruff knows each version's syntax (`target-version` in ruff.toml); `ast.parse(feature_version=...)` does not."""
    check = [sys.executable, "-m", "ruff", "check", "--select", "E9", "--no-cache", "--config", str(ROOT / "ruff.toml")]
    done = subprocess.run([*check, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    newer = tmp_path / "newer.py"
    newer.write_text("def f(table, key):\n    return table[*key, 0]\n")  # 3.11's syntax
    assert subprocess.run([*check, str(newer)], capture_output=True).returncode == 1
