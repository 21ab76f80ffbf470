"""Files are replaced atomically, partial files of killed processes are removed, and directories are private."""

import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from range_store.atomic_files import atomic_write, make_private_directory, remove_partial_files


def test_a_private_directory_and_those_made_above_it_are_their_owners_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for _ in range(2):
        make_private_directory(tmp_path / "a" / "b" / "c")
        modes = [stat.S_IMODE((tmp_path / each).stat().st_mode) for each in ("a/b/c", "a/b", "a", ".")]
        assert modes == [0o700, 0o700, 0o700, 0o755], "what is there keeps its mode"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        make_private_directory(tmp_path / "file" / "data" / "fits")
    assert caught.value.filename == str(tmp_path / "file" / "data" / "fits")


def test_file_is_replaced_when_writing_ends(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as partial, partial.open("w", encoding="ascii") as file:
        file.writelines(["ne", "ẇ"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_system_error_names_the_target_file(tmp_path: Path) -> None:
    absent = tmp_path / "no" / "such" / "file"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(absent) as partial:
        partial.write_text("")
    assert caught.value.filename == str(absent)
    path = tmp_path / "arrays.safetensors"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path) as partial:
        save_file({"a": np.zeros(3)}, partial / "below" / "nothing")  # raises an error of its own
    assert caught.value.filename == str(path)


def test_partial_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path; from range_store.atomic_files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial: partial.write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("fit-1.safetensors", "other"):
        assert subprocess.run([sys.executable, "-c", killed, tmp_path / name], check=False).returncode == -9
    with atomic_write(tmp_path / "fit-2.safetensors") as partial_in_use:
        assert len(list(tmp_path.iterdir())) == 3
        remove_partial_files(tmp_path, "fit-*")
        assert partial_in_use.parent.is_dir()
        left = sorted(path.name.split(".")[1] for path in tmp_path.iterdir())
        assert left == ["fit-2", "other"]
        partial_in_use.write_text("whole")
    assert (tmp_path / "fit-2.safetensors").read_text() == "whole"


def test_threads_can_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    barrier = threading.Barrier(2)

    def write(name: str) -> None:
        with atomic_write(path) as partial:
            barrier.wait(60)  # both are writing
            partial.write_text(name)
            if name == "first":
                second_ended.wait(60)

    second_ended = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(write, "first"), pool.submit(write, "second")
        second.result(60)
        assert path.read_text() == "second"
        second_ended.set()
        first.result(60)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
