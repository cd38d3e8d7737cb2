"""Compiled kernels: made once, kept, found again; and what happens where they cannot be made."""

import ctypes
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from msa_compile.errors import KernelBuildError
from msa_compile.kernels import cache_dir as cache
from msa_compile.kernels import native, select_blocks
from msa_compile.kernels.native import build, call


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has compiled nothing yet, and whose kernels are a function that says 7."""
    (tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }')
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_failures", {})
    for function in (build._load, build._warn):
        monkeypatch.setattr(build, function.__name__, functools.cache(function.__wrapped__))
    return tmp_path


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "native").iterdir())


def test_a_library_is_compiled_once_and_again_when_its_source_changes(fresh: Path) -> None:
    assert build.load("seven").seven() == 7
    (made,) = libraries(fresh)
    before = made.stat().st_mtime_ns
    build._load.cache_clear()
    build.load("seven")
    assert made.stat().st_mtime_ns == before
    (fresh / "seven.cpp").write_text('extern "C" int seven() { return 8; }')
    build._load.cache_clear()
    assert build.load("seven").seven() == 8
    assert len(libraries(fresh)) == 2


def test_a_damaged_library_is_compiled_again(fresh: Path) -> None:
    build.load("seven")
    (made,) = libraries(fresh)
    # A new file in its place: this process has the old one mapped.
    made.unlink()
    made.write_bytes(b"half of a libr")
    build._load.cache_clear()
    assert build.load("seven").seven() == 7


def test_without_a_compiler_the_reference_runs_and_says_so_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (fresh / "select_blocks.cpp").touch()
    rows = torch.randn(1, 1, 20, 4)
    with pytest.warns(UserWarning, match=r"no-such-compiler.*\$CXX"):
        ids = select_blocks(rows, rows, block_size=4, topk=2)
    assert ids[0, 0, -1].tolist()[-1] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_blocks(rows, rows, block_size=4, topk=2)
    assert libraries(fresh) == []


def test_a_source_that_does_not_compile_is_quoted(fresh: Path) -> None:
    (fresh / "broken.cpp").write_text("this is no program")
    with pytest.raises(Exception, match="this"):
        build.load("broken")
    assert libraries(fresh) == []


def test_a_folder_that_cannot_be_written_names_the_variable(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(fresh / "file" / "below"))
    with pytest.raises(Exception, match=cache.CACHE_VARIABLE):
        build.load("seven")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners of files")
def test_a_library_that_others_can_write_is_not_loaded(fresh: Path) -> None:
    build.load("seven")
    (made,) = libraries(fresh)
    made.parent.chmod(0o777)
    build._load.cache_clear()
    with pytest.raises(KernelBuildError, match="another user"):
        build.load("seven")


def test_only_what_cannot_be_compiled_goes_to_the_reference(fresh: Path) -> None:
    (fresh / "broken.cpp").write_text("this is no program")
    assert native.holds("seven", torch.float32)
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert not native.holds("broken", torch.float32)
    assert not native.holds("seven", torch.float64)


def test_the_kernels_share_the_threads_of_torch() -> None:
    native.load("select_blocks")
    maps = Path("/proc/self/maps")
    if not maps.exists() or sys.platform != "linux":
        pytest.skip("this system does not tell what a process has loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(loaded) <= 1, "two pools of threads would wait for each other's cores"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_uses_one_thread() -> None:
    code = (
        "import os, torch; from msa_compile.kernels import select_blocks; torch.set_num_threads(2)\n"
        "rows = torch.randn(1, 2, 2000, 16); call = lambda: select_blocks(rows, rows, block_size=16, topk=2)\n"
        "expected = call(); child = os.fork()\n"
        "if child == 0: os._exit(0 if bool((call() == expected).all()) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("work", "threads"), [(0, 1), (call._WORK * 2, 2), (call._WORK * 100, 2)])
def test_a_small_call_stays_on_one_thread(work: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert native.threads_for(work) == threads
    finally:
        torch.set_num_threads(before)


def test_a_tensor_whose_rows_are_spread_is_copied_and_no_other() -> None:
    rows = torch.randn(2, 3, 4, 5)
    assert native.readable(rows.transpose(1, 2)).data_ptr() == rows.data_ptr()
    assert native.readable(rows.transpose(2, 3)).is_contiguous()
    assert native.byte_strides(rows.half()) == (120, 40, 10)
    assert ctypes.sizeof(ctypes.c_float) == rows.element_size()


def test_the_cache_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache.sys, "platform", "linux")
    assert cache.cache_dir() == tmp_path / "msa_compile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir().parts[-2:] == (".cache", "msa_compile")
