"""Text from a file as part of a path: it stays inside its folder, or is refused in one line."""

import pytest

import intrafusion as itf
from intrafusion.runtime.paths import inside


@pytest.mark.parametrize("name", ["cat", "a b", "猫", "a.b", "...", "-rf", "C:", "~", "%2e%2e", "x" * 200])
def test_a_plain_name_is_a_file_in_the_folder(tmp_path, name):
    assert inside(tmp_path, name, name) == tmp_path / name / name


@pytest.mark.parametrize("name", [
    "", ".", "..", "/", "/etc/passwd", "../evil", "a/b", "a/../../evil", "a\\b", "\\\\host\\share", "a\0b", "a\nb", "a\tb",
    "\x7f", "a\u202eb", "a\ufeffb", "\ud800", "x" * 201, "猫" * 70,
])  # fmt: skip
def test_any_other_is_one_line(tmp_path, name):
    for parts in ((name,), ("cat", name), (name, "cat")):
        with pytest.raises(itf.IntrafusionError, match="not a valid file name") as caught:
            inside(tmp_path, *parts)
        assert str(caught.value).isprintable()


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "out").symlink_to(tmp_path)
    (tmp_path / "made" / "in").symlink_to("there")
    assert inside(tmp_path / "made", "in", "x") == tmp_path / "made" / "in" / "x"
    with pytest.raises(itf.IntrafusionError, match="is outside its folder"):
        inside(tmp_path / "made", "out", "x")
