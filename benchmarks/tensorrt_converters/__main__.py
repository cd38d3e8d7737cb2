"""Write the table of torch-tensorrt's converters: `python -m benchmarks.tensorrt_converters [FOLDER]`.

The folder is the package `torch_tensorrt`; default the one that is installed. It is read and not imported, so neither
TensorRT nor a GPU is needed: an unpacked wheel will do. `--check` compares with the table that is there.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msa_compile.export.engine.converters import TABLE

_CONVERTERS = ("aten_ops_converters", "prims_ops_converters", "ops_evaluators")
_GROUPS = ("torch_enabled_decompositions", "torch_disabled_decompositions")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensorrt_converters", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="the package torch_tensorrt")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the table is another")
    options = parser.parse_args()
    text = _to_text(read_table(options.folder or _installed(parser)))
    if options.check:
        is_same = text == TABLE.read_text(encoding="utf-8")
        print("the table is that of these sources" if is_same else "the table is another; run without --check")
        return 0 if is_same else 1
    TABLE.write_text(text, encoding="utf-8")
    print(f"wrote {TABLE}")
    return 0


def _to_text(table: dict[str, Any]) -> str:
    """JSON with a line for each operator."""
    rooms = []
    for name, room in table.items():
        lines = [json.dumps(room)]
        if isinstance(room, dict):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in room.items())
            lines = ["{", inner, " }"]
        elif isinstance(room, list):
            lines = ["[", ",\n".join(f"  {json.dumps(value)}" for value in room), " ]"]
        rooms.append(f" {json.dumps(name)}: " + "\n".join(lines))
    return "{\n" + ",\n".join(rooms) + "\n}\n"


def _installed(parser: argparse.ArgumentParser) -> Path:
    found = importlib.util.find_spec("torch_tensorrt")
    if found is None or found.origin is None:
        parser.error("torch_tensorrt is not installed; give the folder of its sources")
    return Path(found.origin).parent


def read_table(folder: Path) -> dict[str, Any]:
    """What torch-tensorrt converts, decomposes and removes.

    Returns:
        ``version``; ``converters``, for each operator whether open sizes are allowed and the names of its validators;
        ``decomposed``, operators that torch decomposes for it; ``kept``, those that it keeps whole; ``replaced``, those
        that it decomposes by functions of its own; ``removed``, nodes that it drops.
    """
    version = re.search(r'__version__ = "([\d.]+)', (folder / "_version.py").read_text())
    assert version is not None, f"{folder} is not the package torch_tensorrt"
    converters: dict[str, dict[str, Any]] = {}
    for name in _CONVERTERS:
        for call in _calls(folder / "dynamo" / "conversion" / f"{name}.py", "dynamo_tensorrt_converter"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            entry = converters.setdefault(_name(call.args[0]), {"open": False, "validators": []})
            entry["open"] |= given.get("supports_dynamic_shapes") == "True"
            # The validators of an operator with several converters do not all have to agree.
            entry["validators"].append(given.get("capability_validator"))
    lowering = folder / "dynamo" / "lowering"
    groups = _groups(lowering / "_decomposition_groups.py")
    own = [
        *_calls(lowering / "_decompositions.py", "register_torch_trt_decomposition"),
        *_calls(lowering / "_decompositions.py", "replace_inplace_op"),
    ]
    dropped = ast.parse((lowering / "passes" / "remove_assert_nodes.py").read_text())
    return {
        "version": version[1],
        "converters": {name: converters[name] for name in sorted(converters)},
        "decomposed": groups["torch_enabled_decompositions"],
        "kept": groups["torch_disabled_decompositions"],
        "replaced": sorted({_name(call.args[0]) for call in own if _is_operator(call.args[0])}),
        "removed": sorted(
            {_name(node) for node in ast.walk(dropped) if _is_operator(node) and _name(node).count(".") == 2}
        ),
    }


def _calls(path: Path, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def _groups(path: Path) -> dict[str, list[str]]:
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in _GROUPS:
            assert isinstance(node.value, ast.Set), f"{node.target.id} is written as a set"
            found[node.target.id] = sorted(_name(element) for element in node.value.elts)
    return found


def _is_operator(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("aten.", "torch.ops."))


def _name(node: ast.AST) -> str:
    return ast.unparse(node).removeprefix("torch.ops.")


if __name__ == "__main__":
    raise SystemExit(main())
