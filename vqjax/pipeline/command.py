# SPDX-License-Identifier: Apache-2.0
"""What all command lines share: how mistakes become one line and an exit code, and the cache."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from vqjax import settings
from vqjax.errors import VqjaxError

_M_ARENA_MAX = -8  # of malloc.h


def run(work: Callable[[], int | None], wanted: Any) -> int:
    """Runs a command: 0 when done, the error's own code when the user has something to fix.

    Files that cannot be read or written are the user's, too. Other exceptions are our bugs and keep
    their traceback.

    Args:
      wanted: the settings of the command.
    """
    try:
        settings.check_seed(wanted)
        _set_up()
        return work() or 0
    except VqjaxError as error:
        print(f"vqjax: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"vqjax: {where}{error.strerror or error}", file=sys.stderr)
        return VqjaxError.exit_code
    except KeyboardInterrupt:
        print("vqjax: interrupted; what is in a run folder or --json continues", file=sys.stderr)
        return 130


def fix_threads() -> None:
    """Gives XLA as many CPU threads as cores, rounded up to a power of two, at least eight.

    XLA splits sums by the number of its threads, which is the larger one of cores and (simulated)
    devices: bytes would differ between a laptop and a server, and between one device and eight. On
    two cores this costs 8 % of a large matrix product. Call it before jax starts its backend.
    """
    cores = os.cpu_count() or 1
    os.environ.setdefault("NPROC", str(max(8, 1 << (cores - 1).bit_length())))


def _fewer_arenas() -> None:
    """Lets threads share memory that they freed: an eighth less at the peak, where glibc is used.

    By default each thread that compiles or searches keeps its own.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _set_up() -> None:
    """Settings that a command may make and a library may not."""
    # JAX would take most of a GPU's memory at once; other programs on the machine may need it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Not taken ahead, it would still be three quarters of the memory at most.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    fix_threads()
    _fewer_arenas()
    import jax
    import platformdirs

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        folder = platformdirs.user_cache_path("vqjax") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    from vqjax.pipeline import processes

    processes.initialize()
