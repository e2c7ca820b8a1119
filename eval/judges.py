# SPDX-License-Identifier: Apache-2.0
"""Which judge looks at the samples of which model."""

from vqjax.eval import digits, textures
from vqjax.eval.judge import Judge

JUDGES = {judge.kind: judge for judge in (digits.JUDGE, textures.JUDGE)}
"""By the name of the model's config, which is that of its data."""


def of_model(name: str) -> Judge | None:
    """The judge of a model by its config's name; None where its data is not small."""
    return JUDGES.get(name)
