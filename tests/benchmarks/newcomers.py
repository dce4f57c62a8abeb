"""Measure how long a crowd of short sessions delays a newcomer's first result, on a separate public server.

python tests/benchmarks/newcomers.py [SESSIONS ...]: SESSIONS (default 50) from one address, from eight addresses, and from
one address each. Exits with 1 if a newcomer waits for more than 10 s.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from crowding import crowd, newcomer
from visiting import dashboard

MOST = 10.0  # seconds


def main(sessions: int) -> bool:
    good = True
    for addresses in (1, 8, sessions):
        with tempfile.TemporaryDirectory() as folder, dashboard(Path(folder), INTRAFUSION_PUBLIC="1") as server:
            server.until_health("ready")
            alone = newcomer(server, 10)
            with crowd(server, sessions, addresses, at_once=8):
                time.sleep(3)
                waits = [newcomer(server, percent) for percent in (20, 30)]
            jobs = sum(one["event"] == "job started" for one in server.events())
            worst = max(result for _, result in waits)
            good &= worst <= MOST
            told = ", ".join(f"page {page:.1f} s, result {result:.1f} s" for page, result in (alone, *waits))
            print(f"{sessions} sessions from {addresses} addresses ({jobs} jobs began): alone and in the crowd: {told}")
    return good


if __name__ == "__main__":
    sys.exit(0 if all(main(int(text)) for text in sys.argv[1:] or ["50"]) else 1)
