import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS

import intrafusion as itf
from intrafusion.runtime.access import Rate, check_path, check_room, public, upload_mib
from intrafusion.runtime.paths import ASSETS, home


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A folder that the readers of a public server may open, and one beside it that they may not."""
    monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
    for name in ("open", "open too", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.pt").touch()
    monkeypatch.setenv("INTRAFUSION_ROOTS", os.pathsep.join(str(tmp_path / name) for name in ("open", "open too")))
    return tmp_path


def refused(path) -> bool:
    try:
        check_path("weights", str(path))
    except itf.IntrafusionError:
        return True
    return False


class TestPaths:
    def test_here_any_path_may_be_named(self):
        check_path("weights", "/etc/passwd")

    @pytest.mark.parametrize("path", ["open/w.pt", "open too/w.pt", "open", "open/not there.pt", "open/../open/./w.pt"])
    def test_those_in_a_root_may(self, opened, path):
        assert not refused(opened / path)

    @pytest.mark.parametrize(
        "path",
        [
            "closed/w.pt",
            "closed/not there.pt",
            "open/../closed/w.pt",
            "opener/w.pt",
            "",
            "open/../../etc",
            "open/w\0.pt",
        ],
    )
    def test_others_may_not(self, opened, path):
        assert refused(f"{opened}/{path}")

    def test_links_are_followed(self, opened):
        (opened / "open" / "way out").symlink_to(opened / "closed")
        (opened / "closed" / "way in").symlink_to(opened / "open")
        (opened / "open" / "loop").symlink_to(opened / "open" / "loop")
        assert refused(opened / "open" / "way out" / "w.pt")
        assert refused(opened / "open" / "loop" / "w.pt")
        assert not refused(opened / "closed" / "way in" / "w.pt")

    def test_relative_ones_and_those_at_home_are_resolved(self, opened, monkeypatch):
        monkeypatch.chdir(opened / "closed")
        monkeypatch.setenv("HOME", str(opened / "open"))
        assert refused("w.pt")
        assert not refused("../open/w.pt")
        assert not refused("~/w.pt")
        assert refused("~nobody/w.pt")

    def test_without_roots_none_may(self, opened, monkeypatch):
        monkeypatch.delenv("INTRAFUSION_ROOTS")
        assert refused(opened / "open" / "w.pt")
        assert refused(".")
        check_path("weights", None)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(["..", ".", "open", "closed", "w.pt", "~", "", "a b"]), max_size=8))
    def test_no_way_through_a_root_leads_out_of_it(self, parts):
        root = TESTS.resolve()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INTRAFUSION_PUBLIC", "1")
            patch.setenv("INTRAFUSION_ROOTS", str(root))
            path = f"{root}/{'/'.join(parts)}"
            inside = os.path.normpath(path) == str(root) or os.path.normpath(path).startswith(f"{root}/")
            assert refused(path) is not inside


class TestWords:
    def test_here_they_are_left_alone(self):
        assert public(f"no file in {home()}") == f"no file in {home()}"

    def test_a_public_server_names_its_folders_and_hides_where_they_are(self, monkeypatch, tmp_path):
        monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
        monkeypatch.setenv("HOME", "/people/me")
        monkeypatch.setenv("INTRAFUSION_STORE", "/elsewhere/studies.sqlite")
        said = public(
            f"{home()}/models, {ASSETS}/x.json, {itf.__file__}, {os.__file__}, /people/me/x, /people/mean, {tmp_path}"
        )
        assert said.startswith("<cache>/models, <assets>/x.json, <app>/intrafusion/__init__.py, ")
        assert "<home>/x, /people/mean" in said
        assert str(tmp_path) not in said
        assert os.__file__ not in said

    def test_the_store_is_hidden_where_it_lies(self, monkeypatch, tmp_path):
        monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
        monkeypatch.setenv("INTRAFUSION_STORE", "/data/of/us/studies.sqlite")
        assert public("/data/of/us/studies.sqlite is damaged") == "<store>/studies.sqlite is damaged"


class TestRate:
    def test_so_many_and_then_a_wait(self):
        rate = Rate(2, 100, seconds=60)
        assert [rate.wait("a", 1, now) for now in (0.0, 10.0)] == [0, 0]
        assert rate.wait("a", 1, 20.0) == 40  # until the first is forgotten
        assert rate.wait("b", 1, 20.0) == 0
        assert rate.wait("a", 1, 60.0) == 0
        assert rate.wait("a", 1, 60.0) == 10

    def test_so_much_and_then_a_wait(self):
        rate = Rate(100, 10, seconds=60)
        assert [rate.wait("a", 4, now) for now in (0.0, 1.0)] == [0, 0]
        assert rate.wait("a", 4, 2.0) == 58
        assert rate.wait("a", 8, 2.0) == 59
        assert rate.wait("a", 2, 2.0) == 0
        assert rate.wait("a", 11, 2.0) == float("inf")

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=60))
    def test_no_minute_holds_more_and_waiting_is_enough(self, asked):
        rate, now, let = Rate(4, 9, seconds=10), 0.0, []
        for pause, amount in asked:
            now += pause / 2
            if wait := rate.wait("a", amount, now):
                now += wait
                assert rate.wait("a", amount, now) == 0
            let.append((now, amount))
            recent = [one for when, one in let if when > now - 10]
            assert len(recent) <= 4
            assert sum(recent) <= 9


class TestRoom:
    def test_a_public_server_keeps_so_much(self, monkeypatch):
        (home() / "models").mkdir(parents=True)
        (home() / "models" / "big.pt2").write_bytes(b"0" * (1 << 20))
        monkeypatch.setenv("INTRAFUSION_KEPT_MB", "1")
        check_room()
        monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
        with pytest.raises(itf.IntrafusionError, match="limit of 1 MiB"):
            check_room()
        monkeypatch.setenv("INTRAFUSION_KEPT_MB", "2")
        check_room()

    def test_a_bad_setting_is_told(self, monkeypatch):
        monkeypatch.setenv("INTRAFUSION_UPLOAD_MB", "much")
        with pytest.raises(itf.IntrafusionError, match="INTRAFUSION_UPLOAD_MB must be a whole number of MiB, not 'much'"):
            upload_mib()
