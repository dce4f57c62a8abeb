"""Whose turn it is, by a clock of the test's own: nobody waits long, and a newcomer hardly at all."""

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intrafusion.runtime.scheduling import Line

NEVER = threading.Event()


@dataclass(eq=False)
class Asker:
    """needs: turns of computing until it is done. came, served: numbers of turns. left: see `turns.Waiting`."""

    who: str
    needs: int = 1
    left: float | None = None
    came: int = 0
    served: list[int] = field(default_factory=list)


class Room:
    """A line in which each turn takes a second."""

    def __init__(self) -> None:
        self.now = 0
        self.line = Line(turn=1, clock=lambda: float(self.now))

    def come(self, *askers: Asker) -> None:
        for asker in askers:
            asker.came = self.now
            self.line.join(asker)

    def turn(self) -> Asker | None:
        """Let the next one compute for a second; who that was."""
        if not self.line.jobs:
            return None
        over = threading.Event()
        over.set()
        self.line.wait(self.line.jobs[0], over)  # any look at the line gives the turn to the next one
        one = self.line.jobs[0]
        self.now += 1
        one.served.append(self.now)
        self.line.spend(one.who, 1.0)
        one.needs -= 1
        (self.line.pass_on if one.needs else self.line.leave)(one)
        return one


def turns(*askers: Asker, count: int) -> str:
    room = Room()
    room.come(*askers)
    return "".join(one.who if (one := room.turn()) else "-" for _ in range(count))


def test_turns_of_one_reader_go_round():
    room = Room()
    askers = [Asker("a", needs) for needs in (2, 1, 3)]
    room.come(*askers)
    assert [askers.index(room.turn()) for _ in range(6)] == [0, 1, 2, 0, 2, 2]
    assert room.turn() is None


def test_a_newcomer_waits_for_two_turns_however_much_one_reader_has_asked_for():
    room, many, new = Room(), [Asker("many", 100) for _ in range(30)], Asker("new", 3)
    room.come(*many)
    for _ in range(7):
        room.turn()
    room.come(new)
    while not new.served or new.needs:
        room.turn()
    assert new.served[0] - new.came <= 2
    assert new.served[-1] - new.came <= 6  # every other turn


def test_readers_who_have_gone_wait_for_those_who_are_here():
    gone, here = [Asker(f"gone {n}", 100, left=0.0) for n in range(30)], Asker("here", 3)
    room = Room()
    room.come(*gone, here)
    while here.needs:
        room.turn()
    assert here.served[-1] <= 6
    assert room.turn() in gone  # who get their turns all the same


def test_computing_is_forgotten_in_time():
    room = Room()
    room.come(Asker("busy", 60))
    for _ in range(60):
        room.turn()
    busy, other = Asker("busy"), Asker("other")
    room.now += 3600
    room.line.spend("other", 1.0)
    room.come(other, busy)
    room.turn()
    room.come(Asker("other"))
    assert room.turn() is busy  # an hour ago counts for less than a second now


def test_what_leaves_gives_its_turn_away_and_a_stop_ends_waiting():
    line, first, second, stop = Line(), Asker("a"), Asker("b"), threading.Event()
    line.join(first)
    line.join(second)
    line.wait(first, NEVER)
    assert (line.jobs, line.others_wait) == ([first, second], True)
    stop.set()
    line.wait(second, stop)  # without a turn
    assert line.jobs == [first, second]
    line.leave(first)
    line.wait(second, NEVER)
    assert (line.jobs, line.others_wait) == ([second], False)
    line.leave(second)
    line.leave(second)
    assert line.jobs == []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdef"), st.integers(1, 4), st.booleans()), max_size=25))
def test_nobody_waits_for_more_than_two_turns_of_each_who_was_in_line_before(arrivals):
    room, asked, waits = Room(), [], {}
    for pause, who, needs, away in arrivals:
        for _ in range(pause):
            step(room, waits)
        asked.append(Asker(who, needs, 0.0 if away else None))
        room.come(asked[-1])
        waits[asked[-1]] = 2 * len(room.line.jobs)
    while room.line.jobs:
        step(room, waits)
    assert all(asker.needs == 0 for asker in asked)


def step(room: Room, waits: dict[Asker, int]) -> None:
    """One turn; waits: of each who waits, for how many more turns it may."""
    one = room.turn()
    for asker in room.line.jobs:
        waits[asker] = 2 * len(room.line.jobs) if asker is one else waits[asker] - 1
        assert waits[asker] >= 0


@pytest.mark.parametrize("readers", [1, 4, 31])
def test_of_readers_who_come_at_once_each_has_a_first_turn_before_any_has_three(readers):
    seen = turns(*[Asker(chr(97 + n), 5) for n in range(readers)], count=2 * readers)
    assert set(seen) == {chr(97 + n) for n in range(readers)}
    assert max(map(seen.count, seen)) <= 2
