"""The CPU kernels in C++: vectors of the widest kind of the machine, compiled once by its own compiler, and kept.

Nothing here includes a header of torch: a library takes seconds to compile and does not depend on torch's version.
"""

from msa_compile.kernels.native.build import load
from msa_compile.kernels.native.call import byte_strides, dtype_number, holds, readable, run, threads_for

__all__ = ["byte_strides", "dtype_number", "holds", "load", "readable", "run", "threads_for"]
