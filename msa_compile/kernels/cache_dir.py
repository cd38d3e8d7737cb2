"""Where what is made once a machine is kept: measured break-evens and compiled kernels."""

import os
import sys
import tempfile
from pathlib import Path

CACHE_VARIABLE = "MSA_COMPILE_CACHE"


def cache_dir() -> Path:
    """Return ``$MSA_COMPILE_CACHE``, or ``msa_compile`` in the user's cache folder; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in many containers
        name = f"msa_compile-{os.getuid()}" if hasattr(os, "getuid") else "msa_compile"
        return Path(tempfile.gettempdir()) / name
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "msa_compile"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "msa_compile"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "msa_compile"
