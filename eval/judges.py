# SPDX-License-Identifier: Apache-2.0
"""The judges of small data, and which of them looks at the samples of which model."""

from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.eval.judge import Judge
from vqjax.io import digits_data, textures_data

DIGITS = Judge(
    kind="digits",
    name="digit-FD",
    asset="digits_eval.safetensors",
    data=digits_data.load,
    about="the embedded model tests the pipeline and relative damage on 8x8-pixel digits; it says "
    "nothing about ImageNet",
)
TEXTURES = Judge(
    kind="textures",
    name="texture-FD",
    asset="textures_eval.safetensors",
    data=textures_data.load,
    about="texture scores tell how well crops of nine known photographs are reproduced; crops of "
    "one picture are alike, and say nothing about ImageNet",
)

JUDGES = {judge.kind: judge for judge in (DIGITS, TEXTURES)}
"""By the name of the model's config, which is that of its data."""


def of_model(config: LatentDiffusionConfig) -> Judge | None:
    """The judge of a model by its config's name; None where its data is not small.

    The name alone does not do: that of a model from a folder is the folder's.
    """
    judge = JUDGES.get(config.name)
    if judge is None:
        return None
    own = PRESETS[config.name]()
    alike = (config.first_stage.resolution, config.n_classes) == (
        own.first_stage.resolution,
        own.n_classes,
    )
    return judge if alike else None
