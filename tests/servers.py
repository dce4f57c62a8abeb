"""Real servers of the dashboard, to be killed or shared, and readers of a page without a browser."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds that nobody waits for, unless something is wrong
PROGRESS = re.compile(r'(\d+) of (\d+) points on [\d,]+ images: ([^"\x00-\x1f]*)')  # what the pages that run studies say


@contextmanager
def served(store: Path, command: tuple[str, ...] = (sys.executable,)) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server on a free port, at once, whose results go to this file; it does not outlive the block.

    command: what runs Python. Its output goes to a file beside the store.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*command, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    env = {**os.environ, "INTRAFUSION_STORE": str(store), "OMP_NUM_THREADS": "1"}
    with store.with_name(f"{store.name}.log").open("a") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


class Tab:
    """A page as its reader's browser has it: texts that came, drawn anew whenever `look` is called.

    page: its address, as "curves?model=digits-mlp". Raises OSError or WebSocketException once the server is gone.
    """

    def __init__(self, port: int, page: str):
        self._page, _, self._query = page.partition("?")
        self._open = ExitStack()
        address = f"ws://127.0.0.1:{port}/_stcore/stream"
        self._socket = self._open.enter_context(connect(address, max_size=None, ping_interval=None))

    def close(self) -> None:
        self._open.close()

    def look(self) -> str:
        """Run the page, as a reload does; all that it sends until it has ended, as text."""
        asked = BackMsg()
        asked.rerun_script.query_string, asked.rerun_script.page_name = self._query, self._page
        self._socket.send(asked.SerializeToString())
        told = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = ForwardMsg.FromString(self._socket.recv(timeout=PATIENCE))
            if message.WhichOneof("type") == "script_finished":
                return "\n".join(told)
            told.append(str(message))
        raise TimeoutError(f"{self._page} did not end")

    def progress(self) -> tuple[int, int, str]:
        """Points done, points in all, and in words how far the study is, as the page says now; (0, 0, "") before it does."""
        found = PROGRESS.findall(self.look())
        return (int(found[-1][0]), int(found[-1][1]), found[-1][2]) if found else (0, 0, "")


GONE = (OSError, WebSocketException)  # what a tab raises when its server was killed
