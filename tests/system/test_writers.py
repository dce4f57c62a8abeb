"""Writers that are killed, and writers on a full disk; 50 kills of each are in `benchmarks/kills.py`."""

import shlex
import subprocess
import sys
from contextlib import suppress

import pytest
from places import ROOT, TESTS
from store_processes import small_disk


def test_what_is_kept_is_the_old_or_the_new_one(tmp_path):
    words = [sys.executable, str(TESTS / "support" / "writers.py"), "2", "0"]
    with suppress(pytest.skip.Exception):  # without the right to mount a disk, the kills alone
        words = [*small_disk(tmp_path), shlex.join([*words, str(tmp_path)])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": 2 kills") == 5
