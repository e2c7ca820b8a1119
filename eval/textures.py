# SPDX-License-Identifier: Apache-2.0
"""texture-FD and its companions: how near samples are to crops of known photographs."""

from vqjax.eval.judge import Judge
from vqjax.io import textures_data

NAME = "texture-FD"
JUDGE = Judge(
    kind="textures",
    name=NAME,
    asset="textures_eval.safetensors",
    data=textures_data.load,
    about="texture scores tell how well crops of nine known photographs are reproduced; crops of "
    "one picture are alike, and say nothing about ImageNet",
)
