"""Each model of the zoo is built and compiled once a process; the sparse ops are counted in every call."""

from collections.abc import Iterator

import pytest
import torch

from models.subject import OpCalls, Subject
from models.zoo import ZOO


@pytest.fixture(autouse=True)
def quiet_torch() -> Iterator[None]:
    """One thread, because the models are tiny; no gradients, because nothing here trains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


_subjects: dict[str, Subject] = {}


@pytest.fixture
def ops(monkeypatch) -> OpCalls:
    return OpCalls(monkeypatch)


@pytest.fixture(scope="session", params=list(ZOO))
def zoo_name(request) -> str:
    """Session scope makes pytest order tests by model, so that each is compiled once."""
    return request.param


@pytest.fixture
def subject_of(ops):
    """Looks a subject up by name."""

    def find(name: str) -> Subject:
        if name not in _subjects:
            _subjects[name] = Subject(name)
        _subjects[name].ops = ops
        return _subjects[name]

    return find


@pytest.fixture
def subject(zoo_name, subject_of) -> Subject:
    return subject_of(zoo_name)
