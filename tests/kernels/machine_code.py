# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels as machine code, with the triton wheel, which brings NVIDIA's assembler."""

import pathlib
from typing import Any

import pytest

CAPABILITIES = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA H200": 90}


def kept_modules(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> list[str]:
    """A list that the text of every kernel is added to when it is lowered; skips without triton."""
    pytest.importorskip("triton")
    lowering = pytest.importorskip("jax._src.pallas.triton.lowering")
    made: list[str] = []
    original = lowering.lower_jaxpr_to_triton_module

    def keep(*args, **kwargs):
        result = original(*args, **kwargs)
        made.append(result.module.operation.get_asm(print_generic_op_form=True))
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", keep)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # jax-triton leaves triton without one
    return made


def assembled(text: str, device_kind: str, folder: pathlib.Path, options: dict[str, int]) -> Any:
    """What Triton makes of a kernel, by format: "cubin", "ptx" and those before."""
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    file = folder / "kernel.ttir"
    file.write_text(text)
    target = backends.GPUTarget("cuda", CAPABILITIES[device_kind], 32)
    return triton.compile(str(file), target=target, options=options).asm
