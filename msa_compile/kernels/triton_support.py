"""Whether the Triton kernels can run on a device; where they cannot, a call says so once and runs the reference."""

import functools
import importlib.util
import warnings

import torch

# Triton's matrix products start with Ampere.
_LEAST_CAPABILITY = (8, 0)
# Matrix products of e4m3 start with Ada.
_E4M3_CAPABILITY = (8, 9)


# The answer for a device does not change while the process lives, and is warned about when it is first asked for.
@functools.cache
def can_run_triton(device: torch.device) -> bool:
    """Whether the kernels run here; if not, warn, once for each device."""
    reason = why_no_triton(device)
    if reason is not None:
        warnings.warn(
            f"msa_compile runs its plain torch reference on {device}, which is many times slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


def why_no_triton(device: torch.device) -> str | None:
    """Say why the kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "the kernels have never been tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0, and it has {capability[0]}.{capability[1]}"
    return None


def why_no_e4m3(device: torch.device) -> str | None:
    """Say why kernels cannot multiply e4m3 on `device`, or None if they can; interpreted ones can."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _E4M3_CAPABILITY:
        return None
    return f"products of e4m3 need compute capability 8.9, and {device} has {capability[0]}.{capability[1]}"
