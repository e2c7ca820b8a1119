# SPDX-License-Identifier: Apache-2.0
"""`vqjax.quantize(...)`, the function; `python -m vqjax.quantize`, the command."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Report


def quantize(source: str | os.PathLike = "digits", **config: Any) -> "Report":
    """Compresses a latent diffusion model's U-Net and writes a run folder with a report.

    Args:
      source: a checkpoint file, a diffusers folder, or "digits" (`vqjax.load`).
      **config: fields of `vqjax.settings.QuantizeSettings`, the options of the command: `bits`,
        `act_bits`, `tune_steps`, `plan`, `out`, `export`, `samples`, and the others. Since a run
        records the command that repeats it, `config` is a name or a JSON file here, too.

    Returns:
      The run folder and the content of its report.json.

    Raises:
      VqjaxError: for anything to fix in the source or the settings.
    """
    from vqjax import settings
    from vqjax.pipeline.quantize import run

    values = {"source": source, **config}
    return run(settings.of_call(settings.QuantizeSettings, values, "vqjax.quantize"))
