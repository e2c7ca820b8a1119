# SPDX-License-Identifier: Apache-2.0
"""What a run will take on this machine, told before its files are there."""

import dataclasses
import pathlib

import jax

from vqjax import models, sampling, settings
from vqjax.config import LatentDiffusionConfig, find
from vqjax.core import folding, tree
from vqjax.core.flops import layer_flops, total
from vqjax.core.plan import make_plan
from vqjax.eval.report import duration, size
from vqjax.io import published
from vqjax.pipeline import calibrate, estimate, evaluate, planning, quantize
from vqjax.pipeline.run_file import Run
from vqjax.pipeline.sources import EMBEDDED

_INCEPTION_FLOPS = 1.14e10  # of one picture
# Of the speed of a large matrix product: on a CPU two cores see 13 a second, elsewhere a guess.
_INCEPTION_SHARE_CPU, _INCEPTION_SHARE = 0.6, 0.2
_FEATURE_BYTES = 4 * (2048 + 2023 + 1008)
_REFERENCE_PICTURES = 10_000  # of the published reference


@dataclasses.dataclass(frozen=True)
class Cost:
    """A prediction.

    Attributes:
      seconds: by stage.
      memory: peak resident bytes of the quantization; 0 without one.
      disk: bytes of samples and features.
      uncounted: reference whose number of pictures is not known before it is opened; their features
        are in none of the numbers.
    """

    seconds: dict[str, float]
    memory: int
    disk: int
    uncounted: str | None = None

    def describe(self) -> str:
        """One line."""
        whole = duration(sum(self.seconds.values()))
        parts = ", ".join(f"{stage} {duration(s)}" for stage, s in self.seconds.items())
        memory = f"; about {size(self.memory)} of memory" if self.memory else ""
        device = jax.devices()[0].device_kind
        more = f"; beside that, the features of {self.uncounted}" if self.uncounted else ""
        return f"about {whole} on {device} ({parts}){memory}; {size(self.disk)} on disk{more}"


def config_of(
    wanted: settings.QuantizeSettings | settings.EvaluateSettings,
) -> LatentDiffusionConfig | None:
    """Of the model that these settings start from; None where they do not name it.

    Raises:
      VqjaxError: if they name a configuration that there is not.
    """
    name = wanted.config or (EMBEDDED if wanted.source == EMBEDDED else None)
    return None if name is None else find(name)


def predict(run: Run) -> Cost | None:
    """Predicts a run of a model; None where the run does not say which configuration it has.

    The same measured speed and fitted factors as `--dry-run` of a quantization; evaluation alone
    is counted work over that speed.
    """
    wanted = run.quantize or run.evaluate
    assert wanted is not None
    config = config_of(wanted)
    if config is None:
        return None
    params = folding.fold(config, models.param_shapes(config)).params
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    sizes = calibrate.trace_layers(config, params)
    budget = planning.budget(config, shapes, run.quantize or settings.QuantizeSettings())
    plan = make_plan(shapes, **budget)
    seconds, peak, disk, uncounted = {}, 0, 0, None
    if run.quantize is not None:
        division = quantize.division_of(config, shapes, plan, sizes, run.quantize)
        expected = quantize.expected_of(config, shapes, plan, sizes, run.quantize, division)
        taught = expected.seconds.get("tune", 0.0)
        seconds["quantize"] = sum(expected.seconds.values()) - taught
        if taught:
            seconds[f"tune {quantize.tune_steps_of(config, run.quantize):,} steps"] = taught
        peak = sum(expected.memory.values())
    if run.evaluate is not None:
        forward = total([layer_flops(shapes[p], plan[p], sizes[p].positions) for p in plan]).dense
        twins = 2 if run.quantize is not None or run.evaluate.against else 1
        more, disk = _evaluation(config, run.evaluate, float(forward), twins)
        seconds |= more
        uncounted = _uncounted(run.evaluate)
    return Cost(seconds, peak, disk, uncounted)


def _evaluation(
    config: LatentDiffusionConfig, wanted: settings.EvaluateSettings, forward: float, twins: int
) -> tuple[dict[str, float], int]:
    """Seconds by stage and bytes on disk."""
    count = twins * (wanted.count or evaluate.default_count(config))
    guidance = config.guidance if wanted.guidance is None else wanted.guidance
    calls = wanted.steps * (2 if sampling.guided(config, guidance) else 1)
    flops = estimate.picture_flops(config, forward, calls=calls)
    speed = estimate.flops_per_second()
    height, width, channels = config.latent_shape
    disk = count * (3 * config.first_stage.resolution**2 + 4 * height * width * channels)
    seconds = {"sample": count * flops / speed / estimate.NETWORK_SHARE}
    if wanted.inception is not None:
        known = wanted.reference is not None and _uncounted(wanted) is None
        seen = count + (_REFERENCE_PICTURES if known else 0)
        share = _INCEPTION_SHARE_CPU if jax.default_backend() == "cpu" else _INCEPTION_SHARE
        seconds["features"] = seen * _INCEPTION_FLOPS / speed / share
        disk += seen * _FEATURE_BYTES
    return seconds, disk


def _uncounted(wanted: settings.EvaluateSettings) -> str | None:
    """The reference, unless it is the published one, whose size is known, or needs no features."""
    if wanted.reference is None or wanted.inception is None:
        return None
    return None if pathlib.Path(wanted.reference).name in published.FILES else str(wanted.reference)
