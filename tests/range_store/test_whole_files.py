"""A file is there whole or not at all, and what a killed process left behind goes."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from range_store.whole_files import remove_leftovers, written_whole


def test_what_is_written_is_there_at_the_end_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_whole(path) as partial, partial.open("w", encoding="ascii") as file:
        file.writelines(["ne", "ẇ"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_names_the_file_whoever_met_it(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "such" / "file"
    with pytest.raises(FileNotFoundError) as caught, written_whole(nowhere) as partial:
        partial.write_text("")
    assert caught.value.filename == str(nowhere)
    path = tmp_path / "arrays.safetensors"
    with pytest.raises(FileNotFoundError) as caught, written_whole(path) as partial:
        save_file({"a": np.zeros(3)}, partial / "below" / "nothing")  # it has an error of its own for that
    assert caught.value.filename == str(path)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path; from range_store.whole_files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as partial: partial.write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("fit-1.safetensors", "other"):
        assert subprocess.run([sys.executable, "-c", killed, tmp_path / name], check=False).returncode == -9
    with written_whole(tmp_path / "fit-2.safetensors") as living:
        assert len(list(tmp_path.iterdir())) == 3
        remove_leftovers(tmp_path, "fit-*")
        assert living.parent.is_dir()
        left = sorted(path.name.split(".")[1] for path in tmp_path.iterdir())
        assert left == ["fit-2", "other"]
        living.write_text("whole")
    assert (tmp_path / "fit-2.safetensors").read_text() == "whole"


def test_two_threads_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    barrier = threading.Barrier(2)

    def write(name: str) -> None:
        with written_whole(path) as partial:
            barrier.wait(60)  # both have begun
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
