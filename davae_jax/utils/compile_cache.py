"""Keeps compiled programs on the disk, so that a command that is started again compiles nothing.

JAX does so if it is given a folder. Here that is the user's cache folder, with what JAX leaves to the caller: one
folder for each type of processor, for which JAX compiles but which its keys do not name; a limit of the size; checksums
of the entries, which contain machine code; and one line in place of JAX's warnings.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import glob
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from davae_jax.utils.errors import first_line
from davae_jax.utils.files import user_cache_folder, write_json

FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_BYTES = 1 << 29  # of a folder; JAX then removes the entries that have not been used for longest
SUMS_FILE = "sums.json"
REJECTED = 3  # entries that cannot be loaded, after which none is expected to be
LOCK_SECONDS = 10
ENTRY, TIME = "-cache", "-atime"  # the ends of the names of an entry's two files
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL)


def use_compile_cache() -> None:
    """Lets JAX keep compiled programs in the user's cache folder. Call it before JAX compiles the first one.

    A folder that the environment names in JAX_COMPILATION_CACHE_DIR is used instead, as JAX would. If the folder cannot
    be used, there is a warning, and JAX keeps nothing.
    """
    folder, own = None, False
    try:
        default = default_folder()
        own = os.environ.get(FOLDER_VARIABLE, str(default)) == str(default)
        folder = default if own else Path(os.environ[FOLDER_VARIABLE])
        if own:
            _make_private(folder)
            _remove_damaged(folder)
    except OSError as e:  # no rights, or no home folder
        warnings.warn(
            f"{folder or 'the cache folder'}: {_reason(e)}; programs are compiled at every start", stacklevel=2
        )
        disable_compile_cache()
        return
    if own:
        atexit.register(_write_sums, folder)
        small = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
        # XLA's own caches have no limit, and their path would be part of the keys.
        _configure(
            jax_compilation_cache_dir=str(folder),
            jax_compilation_cache_max_size=MAX_BYTES,
            jax_persistent_cache_enable_xla_caches="none",
            **small,
        )
    warnings.showwarning = _explaining(warnings.showwarning, folder)


def disable_compile_cache() -> None:
    """Lets JAX neither read nor keep compiled programs from now on, in this process and those that it starts."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if "jax" in sys.modules:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX reads the setting once


def default_folder() -> Path:
    """Returns the folder for this type of processor. Raises FileNotFoundError if there is no home folder."""
    return user_cache_folder() / "programs" / sha256(_processor().encode()).hexdigest()[:16]


def _processor() -> str:
    """Returns a description of the processor that differs where its instructions or its tuning do."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().partition("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa")
    lines = [line for line in first.splitlines() if line.partition("\t")[0].strip() in names]
    return "\n".join([platform.machine(), *lines])


def _make_private(folder: Path) -> None:
    """Makes the folder. Raises OSError if it cannot be written, or another user could write programs into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("cannot be written")
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError("belongs to another user, or others may write to it")


def _remove_damaged(folder: Path) -> None:
    """Removes entries whose bytes have changed, and those of which a killed process has written a part."""
    with _locked(folder):
        sums, damaged = _read_sums(folder), []
        for entry in folder.glob(f"*{ENTRY}"):
            time = entry.with_name(entry.name.removesuffix(ENTRY) + TIME)
            if not time.exists() or sums.get(entry.name) not in (None, crc32(entry.read_bytes())):
                damaged.append(entry)
        for entry in damaged:
            entry.unlink()
            sums.pop(entry.name, None)
        if damaged:
            write_json(folder / SUMS_FILE, sums)


def _write_sums(folder: Path) -> None:
    """Writes the checksums of the entries, to which this process may have added some, or replaced them."""
    try:
        with _locked(folder):
            known, file = _read_sums(folder), folder / SUMS_FILE
            written = file.stat().st_mtime_ns if known else 0
            sums = {}
            for entry in folder.glob(f"*{ENTRY}"):
                is_older = entry.name in known and entry.stat().st_mtime_ns < written
                sums[entry.name] = known[entry.name] if is_older else crc32(entry.read_bytes())
            if sums != known:
                write_json(file, sums)
    except OSError:  # a full disk: these entries are not checked
        pass


def _read_sums(folder: Path) -> dict[str, int]:
    try:
        sums = json.loads((folder / SUMS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}


def _locked(folder: Path) -> Any:
    """Returns JAX's lock of the folder, as a context manager that raises an OSError if it cannot be had."""
    from filelock import FileLock

    return FileLock(folder / ".lockfile", timeout=LOCK_SECONDS)


def _configure(**settings: Any) -> None:
    """Sets JAX's settings, for processes that this one starts too. Those in the environment are left as they are."""
    for name, value in settings.items():
        if name.upper() in os.environ:
            continue
        os.environ[name.upper()] = str(value)
        if "jax" in sys.modules:
            import jax

            jax.config.update(name, value)


def _explaining(show: Callable[..., None], folder: Path) -> Callable[..., None]:
    """Returns a function for `warnings.showwarning` that handles JAX's warnings about entries of the folder.

    A damaged entry is removed, so that JAX replaces it. If several cannot be loaded, this JAX rejects what it has
    compiled for this machine: the cache is switched off with one line, and so it is if the system does not let it be
    read. Entries that cannot be written are reported once.
    """
    failed = {"reading": 0, "writing": 0}

    def show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if not (failure := _FAILURE.match(str(message))):
            return show(message, *args, **kwargs)
        action, program, reason = failure.groups()
        failed[action] += 1
        if action == "reading" and failed[action] < REJECTED and not _is_of_system(reason):
            with contextlib.suppress(OSError):
                for entry in folder.glob(f"{glob.escape(program)}-*{ENTRY}"):
                    entry.unlink(missing_ok=True)
        elif action == "reading":
            disable_compile_cache()
            problem = f"JAX cannot load the programs that it has kept ({first_line(reason)}); they are compiled anew"
            show(f"{folder}: {problem}", *args, **kwargs)
        elif failed[action] == 1:
            show(f"{folder}: compiled programs cannot be kept ({first_line(reason)})", *args, **kwargs)

    return show_warning


def _is_of_system(reason: str) -> bool:
    """Returns whether a reason, which begins with an exception's name, is a full disk, missing rights or a lock."""
    name = reason.partition(":")[0]
    kind = getattr(builtins, name, None)
    return name == "Timeout" or (isinstance(kind, type) and issubclass(kind, OSError))


def _reason(error: OSError) -> str:
    """Returns what is wrong with a folder, without its name."""
    return error.strerror or str(error)
