"""Lets a training process keep its memory, in huge pages.

XLA allocates the buffers of a training step on the CPU with malloc and frees them after it. By default, glibc returns
large buffers to the operating system, which has to clear every page again before the next step: up to 40 % of a step's
time. The settings that prevent this are read when a process starts, so the program is started anew.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

KEEP = "4000000000"  # bytes; smaller buffers, and free memory up to this size, are kept
# Each save has threads of its own, and memory that a thread frees serves threads of the same arena alone. Without a
# limit there are eight arenas a core, and a training's memory grows for thousands of steps until each has its share.
ARENAS = max(4, os.cpu_count() or 1)
SETTINGS = {
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max={ARENAS}",
    "MALLOC_MMAP_THRESHOLD_": KEEP,
    "MALLOC_TRIM_THRESHOLD_": KEEP,
}
RESTARTED = "davae_restarted"  # marks the second start; the environment may lose its marks
TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this program anew with `SETTINGS`, as the same process; returns if that is useless or has been done.

    It is useless without glibc or transparent huge pages. An environment that contains one of the settings, even an
    empty one, is left as it is, and so is a program in a debugger. Call it before anything is printed.
    """
    has_begun = RESTARTED in sys._xoptions or sys.gettrace() or not sys.executable or not Path(sys.argv[0]).is_file()
    if has_begun or any(name in os.environ for name in SETTINGS) or platform.libc_ver()[0] != "glibc":
        return
    try:
        if "[never]" in TRANSPARENT_HUGE_PAGES.read_text(encoding="ascii"):
            return
        argv = [sys.executable, "-X", RESTARTED, *sys.orig_argv[1:]]
        os.execve(sys.executable, argv, os.environ | SETTINGS)
    except OSError:  # no such kernel feature, or the program cannot be started by this path: trains as it is
        return
