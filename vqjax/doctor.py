# SPDX-License-Identifier: Apache-2.0
"""`python -m vqjax.doctor`: what is installed, which paths run here, and a self-test of seconds.

Its output is what a bug report needs. Exit code 0 if every self-test passed, 4 otherwise.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable

import tyro

from vqjax.errors import QualityGateError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tyro",
    "scikit-learn",
)
OPTIONAL = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-triton",
    "triton",
    "tensorflow-datasets",
    "scikit-image",
)
ASSETS = {
    "embedded model": "digits.safetensors",
    "evaluation networks, digits": "digits_eval.safetensors",
    "evaluation networks, textures": "textures_eval.safetensors",
}

Row = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """Shows versions, devices and which paths run here, and tests the installation."""

    self_test: bool = True
    """Also compute something with every part; takes ten seconds or so."""
    seed: int = 0
    """Of what the self-test computes with."""


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 0, or 4 if a self-test failed."""
    settings = tyro.cli(DoctorSettings, args=argv, prog="python -m vqjax.doctor")
    _show("versions", versions())  # first, so that a broken jax is seen beside its version
    from vqjax.pipeline import command

    return command.run(lambda: examine(settings), settings)


def examine(settings: DoctorSettings) -> int:
    """Prints what there is to know beyond the versions; returns the exit code."""
    _show("devices", devices())
    _show("paths", paths())
    _show("files", files())
    if not settings.self_test:
        return 0
    results = [run_check(name, check, settings.seed) for name, check in CHECKS.items()]
    _show("self-test", ((name, text) for name, text, _ in results))
    failed = [name for name, _, passed in results if not passed]
    print(f"\n{len(failed)} of {len(results)} self-tests failed" if failed else "\nall is well")
    return QualityGateError.exit_code if failed else 0


def versions() -> list[Row]:
    """vqjax, Python, the machine, and every package that results depend on."""
    import vqjax

    rows = [
        ("vqjax", vqjax.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("machine", f"{platform.platform()}, {os.cpu_count()} CPUs"),
    ]
    rows += [(name, _version(name) or "MISSING") for name in PACKAGES]
    return rows + [(name, found) for name in OPTIONAL if (found := _version(name))]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[Row]:
    """Every device JAX sees: kind, compute capability and memory where it tells them."""
    import jax

    rows = []
    for device in jax.devices():
        parts = [device.device_kind]
        if capability := getattr(device, "compute_capability", None):
            parts.append(f"compute capability {capability}")
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            parts.append(f"{limit / 2**30:.1f} GiB for JAX")
        rows.append((f"{device.platform}:{device.id}", ", ".join(parts)))
    return rows


def paths() -> list[Row]:
    """Which implementations of a quantized layer run on the default device."""
    from vqjax.kernels import dispatch

    return dispatch.overview()


def files() -> list[Row]:
    """The cache folder, and the shipped weights with size and hash."""
    import platformdirs

    rows = [("cache folder", str(platformdirs.user_cache_path("vqjax")))]
    for name, asset in ASSETS.items():
        file = importlib.resources.files("vqjax.assets") / asset
        if file.is_file():
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            rows.append((name, f"{asset}, {len(data) / 1e6:.2f} MB, sha256 {digest[:16]}"))
        else:
            rows.append((name, f"MISSING: vqjax/assets/{asset}; install the package again"))
    return rows


def check_decode(seed: int) -> str:
    """Decodes a packed weight and compares with the definition, summed by numpy."""
    import jax.numpy as jnp
    import numpy as np

    from vqjax.core.tensor import VQTensor

    rng = np.random.default_rng(seed)
    codes_OJM = rng.integers(0, 16, (24, 5, 4))
    books_MKG = rng.standard_normal((4, 16, 9)).astype(np.float16)
    tensor = VQTensor.pack(
        jnp.asarray(codes_OJM),
        jnp.asarray(books_MKG),
        rng.random(24),
        shape=(3, 3, 5, 24),
        grouping="conv3x3",
    )
    found = np.asarray(tensor.decode())
    expected_OJG = books_MKG.astype(np.float64)[np.arange(4), codes_OJM].sum(axis=2)
    expected_OJG *= np.asarray(tensor.scales.values(), np.float64)[:, None, None]
    # One vector is one 3x3 kernel: [O, I, ky * kx] to [ky, kx, I, O].
    expected = expected_OJG.reshape(24, 5, 3, 3).transpose(2, 3, 1, 0)
    error = float(np.abs(found - expected).max())
    if not error < 1e-5:
        raise AssertionError(f"decoded weights differ by {error:.1e}")
    return f"largest difference {error:.0e}"


def check_product(seed: int) -> str:
    """Multiplies by packed codes on the path that is taken here, and compares with NumPy."""
    import jax
    import numpy as np

    from vqjax.kernels import decode, specs
    from vqjax.kernels.problem import Problem
    from vqjax.kernels.vq_matmul import api

    problem = Problem("vq_matmul", 5, 40, 24, 3, 16, 8, "float32", "float16")
    operands = specs.random_operands(problem, (5, 40), seed=seed)
    path = api.choice(operands).path
    x_BI, packed_OY, books_MKG, scales_O, _, bias_O = jax.device_get(operands.defining)
    weight_OI = decode.decode(packed_OY, books_MKG, scales_O, groups=problem.groups)
    expected = x_BI @ weight_OI.T + bias_O
    found = np.asarray(jax.jit(api.vq_matmul)(*operands))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error < 1e-5:
        raise AssertionError(f"products by {path} differ by {error:.1e} of the largest")
    return f"by {path}, largest difference {error:.0e} of the largest"


def check_search(seed: int) -> str:
    """Encodes sums of codebook entries: the search has to find codes that lose nothing."""
    import jax
    import jax.numpy as jnp

    from vqjax.core import encode

    key_books, key_codes = jax.random.split(jax.random.key(seed))
    books_MKG = jax.random.normal(key_books, (3, 16, 8))
    codes_OM = jax.random.randint(key_codes, (32, 3), 0, 16)
    metric_GG = jnp.eye(8)
    w_OG = encode.entry_sum(codes_OM, books_MKG)
    for name, found_OM in (
        ("exact", encode.encode_exact(w_OG, metric_GG, books_MKG)),
        ("beam", encode.encode_beam(w_OG, metric_GG, books_MKG, 16**2)),
    ):
        error = float(jnp.abs(encode.entry_sum(found_OM, books_MKG) - w_OG).max())
        if not error < 1e-4:
            raise AssertionError(f"{name} search missed planted codes by {error:.1e}")
    return "exact and beam search find planted codes"


def check_model(seed: int) -> str:
    """One forward pass of the embedded model's U-Net."""
    import jax
    import jax.numpy as jnp

    from vqjax import io, models

    model = io.load_model("digits")
    config = model.config
    x_BHWC = jax.random.normal(jax.random.key(seed), (1, *config.latent_shape))
    predict = jax.jit(models.predict_noise, static_argnums=0)
    context = models.embed_classes(config, model.params, jnp.asarray([3]))
    eps_BHWC = predict(config, model.params, x_BHWC, jnp.asarray([901]), context)
    # A trained model predicts nearly all of the noise that is nearly all of its input.
    error = float(jnp.sqrt(jnp.mean((eps_BHWC - x_BHWC) ** 2)))
    if not error < 0.1:
        raise AssertionError(f"noise predicted with RMS error {error:.3f}, expected below 0.1")
    return f"noise predicted with RMS error {error:.3f}"


def check_first_stage(seed: int) -> str:
    """Encodes real digits and decodes them again."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vqjax import io, models
    from vqjax.io import digits_data

    model = io.load_model("digits")
    held = digits_data.load().held_images
    chosen = np.random.default_rng(seed).choice(len(held), 4, replace=False)
    images = held[chosen].astype(np.float32) / 127.5 - 1
    encode, decode = (jax.jit(f, static_argnums=0) for f in (models.encode, models.decode))
    z_BHWC = encode(model.config, model.params, jnp.asarray(images))
    found = np.asarray(decode(model.config, model.params, z_BHWC))
    error = float(np.sqrt(np.mean((found - images) ** 2)))
    if not error < 0.1:
        raise AssertionError(f"digits come back with RMS error {error:.3f}, expected below 0.1")
    return f"digits come back with RMS error {error:.3f} of a range of 2"


CHECKS: dict[str, Callable[[int], str]] = {
    "decode": check_decode,
    "product": check_product,
    "code search": check_search,
    "U-Net": check_model,
    "first stage": check_first_stage,
}


def run_check(name: str, check: Callable[[int], str], seed: int) -> tuple[str, str, bool]:
    """Runs one self-test: its name, "PASS" or "FAIL" with seconds and detail, whether it passed."""
    start = time.monotonic()
    try:
        detail, passed = check(seed), True
    except Exception as error:  # any failure at all is what is being looked for
        detail, passed = f"{type(error).__name__}: {error}", False
    seconds = time.monotonic() - start
    return name, f"{'PASS' if passed else 'FAIL'}  {seconds:4.1f} s  {detail}", passed


def _show(heading: str, rows: Iterable[Row]) -> None:
    """A rich table on a terminal; elsewhere plain lines, to paste into a bug report."""
    rows = list(rows)
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        print(f"\n[{heading}]", *(f"{n:<{width}}  {text}" for n, text in rows), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=heading, title_justify="left", show_header=False, title_style="bold")
    for name, text in rows:
        passed = {"PASS": "green", "FAIL": "red", "MISS": "red"}.get(text[:4], "")
        table.add_row(name, Text(text, style=passed))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
