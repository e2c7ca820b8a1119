# SPDX-License-Identifier: Apache-2.0
"""Shared test set-up: compiled programs are kept, numerics strict, reference fixtures found."""

import gc
import os
import pathlib

from tests import xla_flags

# Compilation is most of the tests' time: XLA optimizes less, with emitters that take less. Both
# workers and the programs that tests start share what they compile, and so do later runs; the key
# of an entry holds program, flags and jax version. Threads of BLAS that wait keep their cores busy,
# a fifth of the search's time where two workers share two.
for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / "build" / "xla"),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": xla_flags.CHEAP,
}.items():
    os.environ.setdefault(_name, _value)  # before jax and NumPy are imported, which read them then

from vqjax.pipeline import command  # noqa: E402

command.fix_threads()  # as the commands do: then runs in both give the same bytes

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from vqjax.kernels import tuned  # noqa: E402

# Tracing makes much that is garbage and little that is a cycle: a tenth of the tests' time.
gc.set_threshold(50_000, 50, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# What was measured on this machine is not what tests shall depend on.
tuned.own_file = lambda: pathlib.Path(os.devnull) / "tiles.json"

# A run gives the memory of its programs back; tests of one process shall share them.
jax.clear_caches = lambda: None


def _forget_modules() -> str | None:
    """Programs that run once they are compiled no longer keep the module they were compiled from.

    JAX keeps each in a context of its own as long as its caches last, and MLIR looks through all
    contexts that there are whenever it makes one: after a thousand programs JAX takes several times
    as long to lower and compile the next. Returns why that cannot be helped here, or None.
    """
    try:
        from jax._src.interpreters import pxla

        compiled, forget = pxla.MeshComputation.compile, pxla._cached_lowering_to_hlo.cache_clear
    except (ImportError, AttributeError) as error:
        return str(error)

    def compile_and_forget(self, *args, **kwargs):
        executable = compiled(self, *args, **kwargs)
        if not (args or kwargs):  # for a call; whoever compiles ahead may want to read the module
            self._hlo = None
            forget()
        return executable

    pxla.MeshComputation.compile = compile_and_forget
    return None


_MODULES_KEPT = _forget_modules()


def pytest_report_header(config):
    return f"modules of compiled programs are kept: {_MODULES_KEPT}" if _MODULES_KEPT else None


def pytest_configure(config):
    # pytest-xdist would begin with the files of most tests and end with a single long one.
    config.option.loadscopereorder = False
    config.addinivalue_line("markers", "xdist_group(name): tests for one worker; for pytest-xdist")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """One worker takes a file whole, or all files of the group that they name.

    Named groups go first, then files with slow tests: both workers are done at about the same time.
    """
    named = {item.path for item in items if item.get_closest_marker("xdist_group")}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in named, item.path not in slow))
    for item in items:
        if item.path not in named:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture
def optimized(monkeypatch):
    """For tests whose work takes longer than compiling it: programs are optimized."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # in what the test starts
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_search(monkeypatch):
    """For runs in this process whose search is not what is tested: few rounds."""
    from tests import quick

    quick.search(monkeypatch.setattr)


GOLDEN_ROOT = pathlib.Path(
    os.environ.get("VQJAX_GOLDEN", pathlib.Path(__file__).parents[2] / "shared")
)


def golden_files(folder: str, pattern: str) -> list[pathlib.Path]:
    """Reference files below $VQJAX_GOLDEN/<folder>, discovered: new ones run the same tests."""
    return sorted((GOLDEN_ROOT / folder).glob(pattern))


def golden_params(folder: str, pattern: str) -> list:
    """Parameters for `pytest.mark.parametrize`: one per file, or one skip that says why."""
    files = golden_files(folder, pattern)
    if not files:
        reason = f"no {pattern} under {GOLDEN_ROOT / folder} (set VQJAX_GOLDEN)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.stem) for path in files]


def relative_rms(found, expected) -> float:
    """RMS of the difference over RMS of the expected array, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
