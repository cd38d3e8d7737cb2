"""Compile a kernel library for this machine, keep it on disk, load it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

from msa_compile.errors import KernelBuildError
from msa_compile.kernels.cache_dir import CACHE_VARIABLE, cache_dir

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
# NaN and infinity have their meaning in these kernels: nothing of -ffast-math.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# In this order, until one compiles: Apple's clang knows neither OpenMP nor, on some chips, -march=native.
_WAYS = (("-march=native", "-fopenmp"), ("-mcpu=native",), ())
_lock = threading.Lock()


def is_available(name: str) -> bool:
    """Return whether `<name>.cpp` can be compiled here; where not, warn once that the reference runs instead."""
    try:
        load(name)
    except KernelBuildError as error:
        _warn(str(error))
        return False
    return True


def load(name: str) -> ctypes.CDLL:
    """Return the library of `<name>.cpp`, which the first call on a machine compiles, in some seconds.

    Raises:
        KernelBuildError: there is no compiler, or it does not take the source, or the result cannot be kept.
    """
    with _lock:
        return _load(name)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"msa_compile: the CPU kernels could not be compiled ({reason}); sparse attention runs on the reference, which "
        "is slower than dense attention. Install a C++ compiler (g++ or clang++), or name one in $CXX",
        stacklevel=2,
    )


@functools.cache
def _load(name: str) -> ctypes.CDLL:
    failure = _failures.get(name)
    if failure is not None:
        raise KernelBuildError(failure)
    try:
        library = _find_or_compile(name)
        _check_owner(library)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            log.warning("%s is compiled again: %s", library, error)
            library.unlink(missing_ok=True)
            return ctypes.CDLL(str(_find_or_compile(name)))
    except (KernelBuildError, OSError) as error:
        # Asked again, a missing compiler is still missing: functools.cache keeps results, not errors.
        _failures[name] = str(error)
        raise KernelBuildError(str(error)) from error


_failures: dict[str, str] = {}


def _find_or_compile(name: str) -> Path:
    compiler = _find_compiler()
    key = hashlib.sha256()
    for path in sorted([*_SOURCES.glob("*.h"), _SOURCES / f"{name}.cpp"]):
        key.update(path.read_bytes())
    # A home folder may be shared by machines whose vectors differ.
    for part in (*compiler, *_FLAGS, *map(str, _WAYS), platform.platform(), platform.machine(), _cpu_features()):
        key.update(part.encode() + b"\0")
    library = cache_dir() / "native" / f"{name}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        started = time.perf_counter()
        try:
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KernelBuildError(f"{library.parent}: {error}; set {CACHE_VARIABLE}") from error
        _compile(compiler, _SOURCES / f"{name}.cpp", library)
        log.info("compiled %s in %.1f s: %s", name, time.perf_counter() - started, library)
    return library


def _check_owner(library: Path) -> None:
    """Raise `KernelBuildError` where somebody else may have put the library there: it is code that will run."""
    if not hasattr(os, "getuid"):
        return
    for path in (library.parent, library):
        found = path.lstat()
        if found.st_uid not in (0, os.getuid()) or found.st_mode & stat.S_IWOTH:
            raise KernelBuildError(f"{path} belongs to, or can be written by, another user; set {CACHE_VARIABLE}")


def _compile(compiler: tuple[str, ...], source: Path, library: Path) -> None:
    # Two processes may compile at once: each writes a file of its own, and a rename is atomic.
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        for way in _WAYS:
            command = [*compiler, *_FLAGS, *way, str(source), "-o", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(name, library)
                return
            log.debug("%s: %s", shlex.join(command), done.stderr)
        raise KernelBuildError(f"{shlex.join(command)}: {done.stderr.strip()[-500:]}")
    except OSError as error:
        raise KernelBuildError(f"{compiler[0]}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _find_compiler() -> tuple[str, ...]:
    named = os.environ.get("CXX")
    if named:
        return tuple(shlex.split(named))
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return (name,)
    raise KernelBuildError("found none of g++, clang++ and c++")


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
