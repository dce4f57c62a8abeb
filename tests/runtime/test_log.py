import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from intrafusion.cli.main import main
from intrafusion.errors import IntrafusionError
from intrafusion.runtime import log


def line(name: str, **fields) -> str:
    """An event as JSON, from the logger to the end of its formatter."""
    record = logging.LogRecord("intrafusion", logging.INFO, "", 0, name, (), fields.pop("exc_info", None))
    record.fields = fields
    return log._Json().format(record)


def test_an_event_is_one_json_object():
    said = json.loads(line("point", key="abc", accuracy=0.5))
    assert said.pop("time").endswith("+00:00")
    assert said == {"level": "info", "event": "point", "key": "abc", "accuracy": 0.5}


@pytest.mark.parametrize("title", ['a\n{"event": "forged"}', "\r\x1b[2J\x00", "\u2028\x85", "\ud800", "é"])
def test_no_name_forges_a_line(title):
    said = line("job ended", title=title)
    assert said.isascii()
    assert said.isprintable()
    assert json.loads(said)["title"] == title


def test_anothers_message_is_an_event_too():
    record = logging.LogRecord("streamlit", logging.WARNING, "", 0, "%s\nlines", ("two",), None)
    said = json.loads(log._Json().format(record))
    assert (said["event"], said["logger"], said["message"]) == ("message", "streamlit", "two\nlines")


def test_an_error_has_its_traceback_and_an_id(caplog):
    number = log.unexpected(ZeroDivisionError("by zero"), "job", title="t")
    (record,) = caplog.records
    said = json.loads(log._Json().format(record))
    assert (said["id"], said["where"], said["title"], said["type"]) == (number, "job", "t", "ZeroDivisionError")
    assert said["traceback"].endswith("ZeroDivisionError: by zero\n")
    assert number != log.unexpected(ZeroDivisionError("by zero"), "job")


class Stuck:
    """A stderr that nobody reads."""

    def __init__(self):
        self.let, self.written = threading.Event(), []

    def write(self, text):
        self.let.wait(60)
        self.written.append(text)

    def flush(self):
        pass


class Bad:
    def __str__(self):
        raise ValueError("no words")


def test_it_neither_blocks_nor_raises(monkeypatch):
    monkeypatch.setattr(log, "_WAITING", 3)
    stuck = Stuck()
    handler = log._Lines(stuck)
    handler.setFormatter(log._Json())
    for number in range(10):
        record = logging.LogRecord("intrafusion", logging.INFO, "", 0, "event", (), None)
        record.fields = {"number": number if number else Bad()}
        handler.handle(record)
    stuck.let.set()
    handler.flush()
    said = [json.loads(text) for text in stuck.written]
    assert 3 <= len(said) <= 4  # one was on its way; the rest is lost
    assert said[0]["message"] == "a line was lost: ValueError"
    assert said[1]["number"] == 1


def run(*words: str, kind: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"INTRAFUSION_LOG": kind}
    return subprocess.run(
        [sys.executable, "-m", "intrafusion", *words], env=environment, capture_output=True, text=True, timeout=120
    )


CURVE = ("curve", "--model", "digits-mlp", "--limit", "20", "--sparsity", "0.1", "0.5", "--json")


def test_a_curve_of_the_command_line_has_a_line_a_point():
    done = run(*CURVE, kind="json")
    *points, last = [json.loads(text) for text in done.stderr.splitlines()]
    rows = [json.loads(text) for text in done.stdout.splitlines()]
    assert [point["event"] for point in points] == ["point"] * 4
    assert {(p["merge"], p["sparsity"], p["accuracy"]) for p in points} == {
        (r["merge"], r["sparsity"], r["accuracy"]) for r in rows
    }
    assert (last["event"], last["message"]) == ("message", "4 points: 0 from the store, 4 measured")


def test_text_is_for_people():
    lines = run(*CURVE, kind="text").stderr.splitlines()
    told = [text for text in lines if text.startswith("INFO:intrafusion:point key=")]  # from a thread of their own
    assert len(told) == 4
    assert [text.partition(": ")[0] for text in lines if text not in told] == ["4 points"]


def test_a_bad_kind_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("INTRAFUSION_LOG", "xml")
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "error: unknown INTRAFUSION_LOG 'xml'; choose one of json, text, off\n"
    with pytest.raises(IntrafusionError):
        log.start("json")
