"""A command replaces only what it made, and only its own files in it."""

import os
import subprocess
import sys

import pytest

from utils.outputs import OWN_FILES, OutputFolder


def made(path, command="train", **files):
    """A folder of an earlier run of `command` with files of it and of the user."""
    OutputFolder(path, command).mark()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return OutputFolder(path, command)


@pytest.mark.parametrize("command", sorted(OWN_FILES))
def test_a_foreign_folder_is_refused_and_stays(tmp_path, command):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("x")
    folder = OutputFolder(thesis, command)
    with pytest.raises(ValueError, match=r"thesis holds something that this command did not write \(chapter.tex\)"):
        folder.check(overwrite=True)
    with pytest.raises(ValueError, match="nothing in it is deleted"):
        folder.clear()
    assert (thesis / "chapter.tex").read_text() == "x"


def test_a_folder_of_another_command_is_foreign(tmp_path):
    made(tmp_path / "x", "merge")
    with pytest.raises(ValueError, match="did not write"):
        OutputFolder(tmp_path / "x", "train").check(overwrite=True)


def test_an_own_folder_needs_overwrite(tmp_path):
    folder = made(tmp_path / "x", config__json="{}")
    with pytest.raises(FileExistsError, match="--overwrite"):
        folder.check(overwrite=False)
    folder.check(overwrite=True)


def test_only_own_files_go(tmp_path):
    folder = made(tmp_path / "x", config__json="{}", notes__txt="mine")
    for name in ("step4", "step4_keep", "step12.partial"):
        (folder.path / "ckpt_model" / name).mkdir(parents=True)
    folder.clear()
    left = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")} - {".read-output.json"}
    assert left == {"notes.txt", "ckpt_model", "ckpt_model/step4_keep"}


@pytest.mark.parametrize("where", ["itself", "below"])
def test_an_input_is_never_inside_the_output(tmp_path, where):
    folder = made(tmp_path / "x")
    base = folder.path if where == "itself" else folder.path / "base"
    base.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="which --version reads"):
        OutputFolder(folder.path, "train", {"--version": base, "--vision_tower": "openai/clip", "--resume": None}).check(True)


def test_an_input_behind_a_link_is_protected(tmp_path):
    folder = made(tmp_path / "x")
    (folder.path / "base").mkdir()
    (tmp_path / "link").symlink_to(folder.path / "base")
    with pytest.raises(ValueError, match="which --version reads"):
        OutputFolder(folder.path, "train", {"--version": tmp_path / "link"}).check(True)


def test_a_link_inside_is_deleted_and_what_it_points_to_is_not(tmp_path):
    folder = made(tmp_path / "x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (folder.path / "ckpt_model").mkdir()
    (folder.path / "ckpt_model" / "step3").symlink_to(tmp_path / "elsewhere")
    folder.clear()
    assert (tmp_path / "elsewhere" / "file").exists() and not (folder.path / "ckpt_model" / "step3").is_symlink()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        OutputFolder(tmp_path / "x", "train").check(True)


def test_a_file_in_the_way_of_a_parent_is_named(tmp_path):
    (tmp_path / "x").write_text("mine", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="x is a file, so that .*x/y/z cannot be made"):
        OutputFolder(tmp_path / "x/y/z", "train").check(True)


def test_a_replacement_keeps_what_lies_beside_own_files_in_a_folder(tmp_path):
    folder = made(tmp_path / "x", "analysis")
    (folder.path / "pictures").mkdir()
    for name in ("a_00000_00_0_sam.jpg", "mine.jpg", "both.txt"):
        (folder.path / "pictures" / name).write_text("old", encoding="utf-8")
    with folder.replacement() as new:
        (new / "pictures").mkdir()
        (new / "pictures/a_00000_00_0_clip.jpg").write_text("new", encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "x/pictures").iterdir()) == ["a_00000_00_0_clip.jpg", "both.txt", "mine.jpg"]


def test_of_two_files_of_one_name_neither_is_lost(tmp_path):
    folder = made(tmp_path / "x", "analysis", notes__txt="mine")
    with pytest.raises(FileExistsError, match="notes.txt could not be moved"), folder.replacement() as new:
        (new / "notes.txt").write_text("new", encoding="utf-8")
    assert sorted(path.read_text(encoding="utf-8") for path in tmp_path.rglob("notes.txt")) == ["mine", "new"]


def test_a_replacement_takes_the_place_when_it_is_whole(tmp_path):
    folder = made(tmp_path / "x", "merge", config__json="old", notes__txt="mine")
    with folder.replacement() as new:
        (new / "config.json").write_text("new")
    assert (folder.path / "config.json").read_text() == "new" and (folder.path / "notes.txt").read_text() == "mine"
    assert folder.is_own() and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path):
    folder = made(tmp_path / "x", "merge", config__json="old")
    with pytest.raises(OSError, match="disk full"), folder.replacement() as new:
        (new / "config.json").write_text("half")
        raise OSError("disk full")
    assert (folder.path / "config.json").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x"]


HOLD = """
import sys, time
from utils.outputs import OutputFolder
with OutputFolder(sys.argv[1], "train").lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on "), OutputFolder(tmp_path / "x", "train").lock():
        pass


def test_the_lock_of_a_dead_process_does_not_block(tmp_path, holder):
    holder.kill()
    holder.wait()
    with OutputFolder(tmp_path / "x", "train").lock():
        assert (tmp_path / "x" / ".read-lock.json").exists()
    assert not (tmp_path / "x" / ".read-lock.json").exists()


def test_the_lock_of_a_dead_process_is_awaited_while_its_workers_end(tmp_path):
    worker = "    import os\n    if os.fork() == 0:\n        time.sleep(1.5)\n        os._exit(0)\n"
    fork = HOLD.replace("    print(", worker + "    print(")
    process = subprocess.Popen([sys.executable, "-c", fork, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, 9)
    process.wait()
    with OutputFolder(tmp_path / "x", "train").lock():  # would raise
        pass


def test_a_place_where_a_file_system_is_mounted_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(OSError, match="file system is mounted"), OutputFolder(tmp_path, "merge").replacement():
        pytest.fail("it worked on a result that could not take its place")
    assert list(tmp_path.iterdir()) == []
