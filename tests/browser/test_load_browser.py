"""Several sessions on one server, by the benchmark that runs twenty of them for minutes."""

import re
import subprocess
import sys

from places import ROOT


def test_sessions_that_move_controls_at_once_see_their_own_values_and_no_error():
    command = [sys.executable, "tests/benchmarks/bench_load.py", "--no-memory"]
    done = subprocess.run(
        [*command, "--visitors", "3", "--seconds", "12", "--think", "0.3", "--beside", "0", "--switches", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exceptions, mixed values, time-outs: none" in done.stdout
    assert re.search(r"slider moves: \d", done.stdout), done.stdout
