"""Register an op with torch's dispatcher: a schema, a kernel for each type of device, a fake.

Not by `torch.library.custom_op`, whose ops pass through two more Python functions in each call. In a decode step, with
caches full of something else, those take as long as the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch

# Lives as long as the process: a Library that is collected takes its registrations with it.
LIBRARY = torch.library.Library("msa", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(name: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `torch.ops.msa.<name>`, which changes no argument; its schema is that of the annotations of `cpu`."""
    schema = torch.library.infer_schema(cpu, mutates_args=())
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"msa::{name}", fake, lib=LIBRARY)
