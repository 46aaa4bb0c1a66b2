"""Files that appear whole or not at all, also behind symbolic links."""

import os

import pytest

from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.files import written_whole


@pytest.fixture
def link(tmp_path):
    """``run/model.safetensors``, a relative link to ``big/v1.safetensors``."""
    for name in ("run", "big"):
        (tmp_path / name).mkdir()
    (tmp_path / "big" / "v1.safetensors").write_text("earlier")
    path = tmp_path / "run" / "model.safetensors"
    path.symlink_to("../big/v1.safetensors")
    return path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_link_stays_and_its_target_is_replaced(link, tmp_path):
    before, inode = tree(tmp_path), link.stat().st_ino
    with written_whole(link) as part:
        assert part.parent == tmp_path / "big" and part.suffix == ".safetensors"
        part.write_text("new")
        assert link.read_text() == "earlier"
    assert os.readlink(link) == "../big/v1.safetensors"
    assert (tmp_path / "big" / "v1.safetensors").read_text() == "new"
    assert link.stat().st_ino != inode  # replaced in one step, not written into
    assert tree(tmp_path) == before


def test_an_error_leaves_link_and_target(link, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), written_whole(link) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert link.is_symlink() and link.read_text() == "earlier" and tree(tmp_path) == before


def test_a_link_to_a_file_that_is_not_there_yet(link, tmp_path):
    (tmp_path / "big" / "v1.safetensors").unlink()
    (tmp_path / "big").rmdir()
    with written_whole(link) as part:
        part.write_text("new")
    assert link.is_symlink() and (tmp_path / "big" / "v1.safetensors").read_text() == "new"


def test_a_link_to_a_place_that_cannot_be_written_to(link, tmp_path):
    (tmp_path / "file").write_text("here")
    link.unlink()
    link.symlink_to("../file/model.safetensors")
    with pytest.raises(PTQ4ViTError, match=f"output: cannot write '{link}': ") as caught:
        with written_whole(link) as part:
            part.write_text("new")
    assert "\n" not in str(caught.value) and link.is_symlink()
