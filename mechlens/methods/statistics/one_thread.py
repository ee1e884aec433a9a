"""One thread for work on many small tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs PyTorch on one thread inside; the process's own number of threads comes back afterwards.

    Small tensors gain nothing from threads, and on a busy machine every one of thousands of short
    operations waits for its slowest thread: a detection took 82 s so, and 16 s on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
