"""The rules of the house that no linter keeps."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import msa_compile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "msa_compile"
OPTIONAL = ("transformers", "rich", "matplotlib", "triton", "onnx", "tqdm")
HOMELESS_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def _sources() -> list[Path]:
    folders = [ROOT / name for name in ("msa_compile", "tests", "examples", "benchmarks")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def _line_limit(path: Path) -> int:
    if path.is_relative_to(PACKAGE / "passes"):
        return 220  # "about 200"
    if path.is_relative_to(PACKAGE / "kernels"):
        return 600
    if path.is_relative_to(ROOT / "tests"):
        return 500
    return 400


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(outcome.stdout.split())


def test_import_loads_no_optional_package_and_prints_nothing():
    # What torch itself loads is not ours to mend: Dynamo loads triton where it is installed.
    allowed = _loaded_by("import torch, networkx, torch._dynamo")
    loaded = _loaded_by("import msa_compile")
    assert "msa_compile" in loaded
    assert not (loaded - allowed) & set(OPTIONAL)


def test_a_verb_keeps_its_name_beside_the_folder_that_is_called_like_it():
    code = "import msa_compile, msa_compile.evaluate.budget; assert callable(msa_compile.evaluate)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_loads_no_triton_kernel():
    code = "import sys, msa_compile; print(*(name for name in sys.modules if name.startswith('msa_compile.')))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    kernels = {path.stem for path in (PACKAGE / "kernels").rglob("triton*.py")} - {"triton_support"}
    assert len(kernels) > 5
    assert not {name.rpartition(".")[2] for name in outcome.stdout.split()} & kernels


def test_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert msa_compile.__version__ == project["version"]


def test_public_names_exist_once():
    assert len(set(msa_compile.__all__)) == len(msa_compile.__all__)
    for name in msa_compile.__all__:
        assert hasattr(msa_compile, name), name


def test_no_file_is_named_for_having_no_home():
    assert [path for path in _sources() if path.name in HOMELESS_NAMES] == []


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_size_law(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= _line_limit(path), f"{lines} lines; split it, the limit here is {_line_limit(path)}"


def test_every_error_class_is_documented_and_can_be_caught_as_one():
    from msa_compile import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 10
    for cls in classes:
        assert issubclass(cls, errors.MSAError)
        assert cls.__doc__


def test_every_room_of_the_package_is_in_the_import_law():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {name.strip(" ()").removeprefix("msa_compile.") for layer in layers for name in layer.split("|")}
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    }
    assert rooms <= named, f"{rooms - named} may import anything; give it a layer in pyproject.toml"
