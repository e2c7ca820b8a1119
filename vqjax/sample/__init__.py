# SPDX-License-Identifier: Apache-2.0
"""`vqjax.sample(...)`, the function; `python -m vqjax.sample`, the command."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from vqjax.core.model import Model


def sample(
    model_or_source: "Model | str | os.PathLike",
    classes: "Sequence[int] | np.ndarray",
    *,
    steps: int = 20,
    guidance: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    integer: bool = False,
    dtype: str = "float32",
    weight_memory: float | None = None,
) -> "np.ndarray":
    """Samples one image per class id.

    Args:
      model_or_source: what `vqjax.load` returns or takes.
      classes: class id of each image; for an unconditional model only their number counts.
      steps: DDIM steps.
      guidance: of classifier-free guidance, 1 is none; by default the model's own, 1.5 for digits
        and textures, else 3.
      eta: 0 is deterministic DDIM, 1 has the noise of DDPM.
      seed: image i depends on (seed, i) alone, whatever the number of images.
      integer: multiply int8 by int8, in models with 8-bit activations and 8-bit integer weights.
      dtype: which the U-Net computes in: "float32", "bfloat16" or "float16".
      weight_memory: most GB (10^9 bytes) of quantized weights that are decoded at load; the others
        stay packed and are decoded in every step, which a line of the log says, unless native code
        was measured to be faster on this CPU. None sets no limit. Weights that kernels read as they
        are stored are not decoded (docs/kernels.md). Decoded integers take a byte each.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      VqjaxError: for an unusable source, class id or setting, or a model that integers cannot
        compute.
    """
    from vqjax import load, sampling
    from vqjax.core.model import Model

    model = model_or_source if isinstance(model_or_source, Model) else load(model_or_source)
    return sampling.generate(
        model,
        classes,
        steps=steps,
        guidance=guidance,
        eta=eta,
        seed=seed,
        integer=integer,
        dtype=dtype,
        weight_memory=weight_memory,
    )
