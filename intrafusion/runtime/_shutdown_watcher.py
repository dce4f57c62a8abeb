"""Watcher process that makes a command end within a second of a signal; see `shutdown`.

It runs as a script, without the package.

stdin: one byte for each signal that the command receives (its number), and BEGIN, END and TOLD from the command itself. stdout:
WAIT or LEAVE, for the command's thread. Arguments: the command's process id, and the message to print if it must be killed.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterable

BEGIN, END = b"(", b")"  # start and end of work that needs more than a second to save its state
TOLD = b"."  # the command has reported that it was cancelled
WAIT, LEAVE = b"w", b"l"  # report that it takes longer; exit now
STAGES = {"interrupt": 0.3, "leave": 0.6, "kill": 0.9}  # seconds from the signal


class Course:
    """State machine that decides which action is due, and when, from the bytes received. Times are seconds of any clock."""

    def __init__(self) -> None:
        self.due: list[tuple[float, str]] = []  # the earliest first
        self.told = False
        self._finishing = 0
        self._asked = self._ending = False

    def hear(self, heard: Iterable[int], now: float) -> None:
        for byte in heard:
            what = bytes([byte])
            if what == TOLD:
                self.told = True
            elif what in (BEGIN, END):
                self._finishing += 1 if what == BEGIN else -1
                if self._asked and not self._finishing:
                    self._end(now)
            elif byte in (signal.SIGINT, signal.SIGTERM):
                if self._finishing and not self._asked:
                    self.due = [(now + STAGES["leave"], "wait")]
                else:
                    self._end(now)
                self._asked = True

    def _end(self, now: float) -> None:
        if not self._ending:  # further signals do not postpone it
            self._ending = True
            self.due = [(now + seconds, stage) for stage, seconds in STAGES.items()]


def main(command: int, words: str) -> None:
    course = Course()
    while os.getppid() == command:
        left = max(0.0, course.due[0][0] - time.monotonic()) if course.due else None
        if select.select([0], [], [], left)[0]:
            heard = os.read(0, 64)
            if not heard:
                return
            course.hear(heard, time.monotonic())
        else:
            _, stage = course.due.pop(0)
            if stage == "interrupt":
                os.kill(command, signal.SIGURG)
            elif stage == "kill":
                os.kill(command, signal.SIGKILL)
                if not course.told:
                    os.write(2, f"{words}\n".encode())
                return
            else:
                os.write(1, WAIT if stage == "wait" else LEAVE)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
