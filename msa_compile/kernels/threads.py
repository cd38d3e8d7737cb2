"""Run independent pieces of work on all cores, one torch thread each.

Torch's own threads split every operation and wait for each other after it. On operations of a tenth of a millisecond
that costs more than it gives as soon as another process uses a core: each wait then lasts a time slice of the system,
4 to 8 ms. Python threads that each run whole operations on one core meet once, at the end.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_lock = threading.Lock()


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run every task once, in any order; raise what the first failing one raised.

    As many threads as torch may use in the calling thread. A task must not call this function, and tasks must not write
    to the same memory.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for task in tasks:
            task()
        return
    # Modes are the caller's alone: another thread would record gradients, or refuse to write to inference tensors.
    is_inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], None]) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            task()

    for done in [_pool(threads).submit(run, task) for task in tasks]:
        done.result()


class Scratch:
    """Memory of one call, a piece a thread: fresh memory costs more to touch for the first time than to fill."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def take(self, size: int) -> Tensor:
        """Return `[size]` float32 that holds anything, and that the thread keeps until its next `take`."""
        held: Tensor | None = getattr(self._of_thread, "held", None)
        if held is None or len(held) < size:
            # The old one goes first, so that there are never two; the new one has room for a little more.
            self._of_thread.held = None
            held = self._of_thread.held = torch.empty(size + size // 4, dtype=torch.float32)
        return held[:size]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="msa_compile", initializer=_use_one_torch_thread)


def _use_one_torch_thread() -> None:
    """Give this thread one torch thread, and leave the number that threads of the user start with as it was.

    `torch.set_num_threads` sets both: the number of the calling thread and that of threads to come. So the second is
    put back by a thread that ends at once.
    """
    with _lock:
        of_new_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(of_new_threads,))
        restorer.start()
        restorer.join()


# Threads do not survive a fork, and a pool that lost them would wait for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
