"""Limits of time and memory for code that a stranger may have written: chat templates."""

import os
import resource
import signal
import threading

SECONDS = 5  # of processor time; an honest template takes less than a thousandth
MEMORY = 1 << 30  # bytes beyond what the process has
PAGE = resource.getpagesize()
STATM = "/proc/self/statm"  # on Linux


class TooMuchWork(Exception):
    pass


class Limits:
    """Within: TooMuchWork after SECONDS, and where MEMORY does not suffice; some 20 microseconds.

    The time is limited in the main thread only, where Python handles signals; the memory on Linux
    only. One compiled step, such as a product of large numbers, is not interrupted.
    """

    def __enter__(self):
        self.timed = threading.current_thread() is threading.main_thread()
        if self.timed:
            signal.signal(signal.SIGVTALRM, stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        if os.path.exists(STATM):
            most = memory_in_use() + MEMORY
            known = [limit for limit in self.before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), self.before[1]))

    def __exit__(self, kind, error, trace):
        if self.timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, self.before)
        if kind is MemoryError:
            raise TooMuchWork(f"it takes more than {MEMORY >> 20} MB") from None


def memory_in_use() -> int:
    """Bytes of address space, which is what RLIMIT_AS counts."""
    file = os.open(STATM, os.O_RDONLY)  # a third of the time of open()
    pages = int(os.read(file, 100).split()[0])
    os.close(file)
    return pages * PAGE


def stop(number, frame):
    raise TooMuchWork(f"it takes more than {SECONDS} s")
