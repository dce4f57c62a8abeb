"""Sees to it that a command ends within a second of a signal; see `shutdown`. This file is run as a script, without the
package.

stdin: a byte for each signal that reaches the command, its number, and BEGIN, END and TOLD from the command itself. stdout:
WAIT or LEAVE for the command's thread. Arguments: the command's process, and what is said for it where it must be killed.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterable

BEGIN, END = b"(", b")"  # work that needs longer than a second to keep its state
TOLD = b"."  # the command has said that it was cancelled
WAIT, LEAVE = b"w", b"l"  # tell that it takes longer; leave now
STAGES = {"interrupt": 0.3, "leave": 0.6, "kill": 0.9}  # seconds from the signal


class Course:
    """What is to be done, and when, after what was heard. Times are in seconds of any clock."""

    def __init__(self) -> None:
        self.due: list[tuple[float, str]] = []  # the next one first
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
        if not self._ending:  # more signals do not put it off
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
