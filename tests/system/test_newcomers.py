"""A crowd of short sessions does not keep a newcomer waiting; `benchmarks/newcomers.py` has a larger one."""

from crowding import CROWD, crowd, newcomer
from visiting import dashboard


def test_a_newcomer_has_a_result_before_the_crowd_has_all_of_its_own(tmp_path):
    with dashboard(tmp_path, INTRAFUSION_PUBLIC="1") as server:
        server.until_health("ready")
        with crowd(server, sessions=8, addresses=2, at_once=4):
            server.until_events("job started", 2)
            _, waited = newcomer(server, 50)
            jobs = [one for one in server.events() if one["event"].startswith("job ") and CROWD in one["title"]]
        assert sum(one["event"] == "job started" for one in jobs) > sum(one["event"] == "job ended" for one in jobs)
        assert waited < 60
