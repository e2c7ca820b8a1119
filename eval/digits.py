# SPDX-License-Identifier: Apache-2.0
"""digit-FD and its companions: how near samples of the embedded model are to real digits."""

from vqjax.eval.judge import SCORES, Judge
from vqjax.io import digits_data

__all__ = ["JUDGE", "NAME", "SCORES"]

NAME = "digit-FD"
JUDGE = Judge(
    kind="digits",
    name=NAME,
    asset="digits_eval.safetensors",
    data=digits_data.load,
    about="the embedded model tests the pipeline and relative damage on 8x8-pixel digits; it says "
    "nothing about ImageNet",
)
load_extractors = JUDGE.extractors
features = JUDGE.features
evaluate_images = JUDGE.evaluate_images
paired_difference = JUDGE.paired_difference
real_halves = JUDGE.real_halves
memorization = JUDGE.memorization
