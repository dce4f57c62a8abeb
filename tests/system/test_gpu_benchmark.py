import re
import subprocess
import sys

import pytest
from places import TESTS


@pytest.mark.gpu
def test_it_runs_to_its_end():
    command = [sys.executable, TESTS / "benchmarks" / "gpu.py", "--small", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\| (ResNet-18|ResNet-50|L1 distances|VGG16-BN)", line)]
    assert len(rows) == 4
    for row in rows:
        kernels, copies, waits = (int(cell.replace(",", "")) for cell in row.split("|")[4:7])
        assert kernels > 0
        assert copies <= waits + 100
