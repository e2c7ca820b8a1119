# SPDX-License-Identifier: Apache-2.0
"""A latent diffusion model as data: its configuration and its parameters."""

import dataclasses
from typing import Any

from vqjax.config import LatentDiffusionConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What every stage takes and returns.

    Attributes:
      config: describes the model completely; plain data.
      params: nested dict of arrays in Linen layout, top level "unet", "first_stage" and, for models
        with classes, "cond_stage". A weight named `kernel` may be a `VQTensor`.
    """

    config: LatentDiffusionConfig
    params: dict[str, Any]
