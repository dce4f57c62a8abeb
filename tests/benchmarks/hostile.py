"""Upload hostile files to a public server as a reader would: is each refused in one line, how fast, and does the server answer?

python tests/benchmarks/hostile.py FILE ...: programs (.pt2), weights, .npz, .zip, and pictures, which are put into a .zip.
Prints one line per file: seconds from the button to the refusal, MiB by which the child and the server grew, and the longest
wait for /_stcore/health meanwhile. Exits with 1 if a file was kept.
"""

import http.client
import io
import os
import re
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from visiting import PATIENCE, Server, Visitor, dashboard, visitor

_EVERY = 0.2  # seconds between two health requests
_KINDS = {".pt2": "program", ".zip": "images", ".npz": "images", ".png": "images", ".jpg": "images"}


class Watch:
    """A thread that polls a server's health, and records the longest wait and the peak memory in bytes."""

    def __init__(self, server: Server):
        self._server, self._over = server, threading.Event()
        self.again()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def again(self) -> None:
        self.longest, self.most = 0.0, _resident(self._server.process.pid)

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(_EVERY):
            began = time.monotonic()
            said = self._server.get("/_stcore/health")
            self.longest = max(self.longest, time.monotonic() - began if said[0] == 200 else float("inf"))
            self.most = max(self.most, _resident(self._server.process.pid))


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def given(reader: Visitor, server: Server, what: str, name: str, content: bytes) -> float:
    """Upload a file on the page Your own and press the uploader's button. Return the time just before the press."""
    reader.messages.clear()
    reader.open("model=digits-mlp", page="your_own")
    elements = [message.delta.new_element for message in reader.messages]
    uploader = next(e.file_uploader for e in elements if e.file_uploader.label.lower() == what)
    file = reader.upload_place(name)
    token = re.search("_streamlit_xsrf=([^;]+)", _answer(server, "GET", "/_stcore/health").headers["Set-Cookie"])[1]  # type: ignore[index]
    headers = {
        "X-Xsrftoken": token,
        "Cookie": f"_streamlit_xsrf={token}",
        "Content-Type": "multipart/form-data; boundary=B",
    }
    head = f'--B\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode()
    assert _answer(server, "PUT", file.upload_url, head + content + b"\r\n--B--\r\n", headers).status == 204
    asked = reader.rerun("your_own")
    value = asked.rerun_script.widget_states.widgets.add(id=uploader.id).file_uploader_state_value
    value.uploaded_file_info.add(file_id=file.file_id, name=name, size=len(content), file_urls=file)
    reader.send(asked)
    button = next(
        m.delta.new_element.button.id for m in reversed(reader.messages) if f"own_{what}_take" in m.delta.new_element.button.id
    )
    asked.rerun_script.widget_states.widgets.add(id=button, trigger_value=True)
    began = time.monotonic()
    reader.send(asked)
    return began


def _answer(server: Server, *request: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(*request)  # type: ignore[arg-type]
    answer = connection.getresponse()
    answer.read()
    return answer


def main(files: list[Path]) -> int:
    kept = 0
    with tempfile.TemporaryDirectory() as folder, _public(Path(folder)) as server, visitor(server) as reader:
        reader.open("model=digits-mlp", page="your_own")
        watch = Watch(server)
        for number, file in enumerate(files):
            name, content = _packed(file)
            watch.again()
            before = watch.most
            began = given(reader, server, _KINDS.get(file.suffix, "weights"), f"{number}{name}", content)
            while not (told := [e for e in server.events() if e["event"] in ("upload refused", "upload kept")][number:]):
                assert time.monotonic() < began + 10 * PATIENCE
                time.sleep(0.02)
            seconds, grown = time.monotonic() - began, (watch.most - before) >> 20
            (check,) = server.until_events("check ended", number + 1)[number:]
            said = told[0].get("reason", "KEPT")
            kept += said == "KEPT"
            print(
                f"{file.name:18} {seconds:5.1f} s ({check['seconds']:.1f} in the child), {check['grown_mib']:4} and {grown:4} "
                f"MiB, {watch.longest:5.2f} s: {said}", flush=True,
            )  # fmt: skip
        watch.end()
    return min(kept, 1)


def _packed(file: Path) -> tuple[str, bytes]:
    """Return the name and the content to upload. A picture is put into a zip archive."""
    if file.suffix not in (".png", ".jpg"):
        return file.name, file.read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"cat/x{file.suffix}", file.read_bytes())
    return f"{file.stem}.zip", packed.getvalue()


@contextmanager
def _public(folder: Path) -> Iterator[Server]:
    with dashboard(folder, INTRAFUSION_PUBLIC="1", INTRAFUSION_PROGRAMS="1") as server:
        server.until_health("ready")
        yield server


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
