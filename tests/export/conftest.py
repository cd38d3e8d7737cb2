"""Each artifact is exported once a process, from a tiny model whose sparse ops run at every length."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Looks an artifact up: name of the model, cache, whether there is padding, indexer."""
    from exported import export_one

    @functools.cache
    def find(name: str, cache: str = "none", *, padded: bool = False, indexer: str = "keys") -> Any:
        return export_one(tmp_path_factory.mktemp("export"), name, cache, padded=padded, indexer=indexer)

    return find
