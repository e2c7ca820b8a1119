# SPDX-License-Identifier: Apache-2.0
"""Native code for CPUs: built on first use where a compiler is there, kept in the user's cache.

The name of a file holds all that it was made from: another machine, compiler flag or version makes
its own.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.resources
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import platformdirs

from vqjax.errors import VqjaxError

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_SECONDS = 120  # for the compiler, which takes five

_log = logging.getLogger("vqjax.kernels")


@functools.cache
def load(package: str, name: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Returns the library made from a C++ file that lies in a package.

    Args:
      name: of the file, which sees the headers of XLA's foreign function interface.
      flags: of the compiler.

    Raises:
      VqjaxError: if there is no compiler, or the file does not compile or load here.
    """
    file = _built(package, name, flags)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise VqjaxError(f"{file} cannot be loaded: {error}; delete it") from None


def _built(package: str, name: str, flags: tuple[str, ...]) -> pathlib.Path:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise VqjaxError(f"native code is for x86-64, this is {platform.machine()}")
    source = (importlib.resources.files(package) / name).read_bytes()
    made_of = [
        source,
        importlib.metadata.version("jaxlib").encode(),
        *map(str.encode, flags),
        _processor(),
    ]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    folder = platformdirs.user_cache_path("vqjax") / "native"
    file = folder / f"{package.rpartition('.')[2]}-{digest}.so"
    if not file.exists():
        _build(source, file, flags)
    return file


def _processor() -> bytes:
    """What the machine can do: native code of another one may not run on it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith(b"flags")), b"")


def _build(source: bytes, file: pathlib.Path, flags: tuple[str, ...]) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise VqjaxError(f"no C++ compiler: none of {', '.join(COMPILERS)} is there, CXX is unset")
    _log.info("building native code with %s, once on this machine", compiler)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, file, flags)
    except OSError as error:
        raise VqjaxError(f"cannot keep native code in {file.parent}: {error}") from None


def _compile(compiler: str, source: bytes, file: pathlib.Path, flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        code, made = pathlib.Path(folder) / "native.cc", pathlib.Path(folder) / file.name
        code.write_bytes(source)
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(code), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VqjaxError(f"{compiler} cannot build native code: {error}") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            reason = (errors or done.stderr.strip().splitlines() or ["no output"])[0]
            raise VqjaxError(f"{compiler} cannot build native code: {reason}")
        made.replace(file)  # whole or not at all, whoever else builds it now
