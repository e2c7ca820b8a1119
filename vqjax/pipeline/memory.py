# SPDX-License-Identifier: Apache-2.0
"""How much memory a run takes at its peak, part by part, and how to stay below a limit.

What a run does follows from the limit and from shapes alone, never from what happens to be free:
the same command must give the same bytes everywhere.
"""

import dataclasses
import math
from collections.abc import Mapping

from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.errors import DoesNotFitError
from vqjax.pipeline.calibrate import LayerInput, batches
from vqjax.settings import Calibration

TRAINED = ("unet", "cond_stage")
"""Parts of a model that are tuned; the first stage stays as it is."""

DEFAULT_MOMENTS = 2_600_000_000  # bytes of moments side by side where nobody set a limit

_RUNTIME = 0.7e9  # interpreter, libraries, and the programs that every run compiles
_PROGRAMS = 42e6  # of one shape of kernel: code, traces, and what compiling them left behind
_STEP_PROGRAMS = 58e6  # more, where it is tuned: they are compiled beside each other
_WEIGHT_COPIES = 3  # full precision, quantized, and the scalar baseline
_MOMENT_COPIES = 2  # sums or what was read, and what is written
_SEARCH_MATRICES = 8  # of one layer, fan-in by fan-in: moment, metric, factors, their workspace
_ACTIVATION_COPIES = 4  # of the largest layer's inputs, in and around it
_TUNING_COPIES = 5  # of what is trained: decoded, its gradient, targets of codes, two moments
_TAUGHT = 2 * 3  # latents of a pair of a lesson, seen and predicted twice; parts and the whole
_KEPT_INPUTS, _KEPT_ATTENTION = 4, 2  # copies of layers' inputs and of attention for the way back
_REMAT_SHARE = 0.25  # of these, where blocks are computed again: their inputs, and one block's own
_REMAT_WEIGHTS = 100_000_000


@dataclasses.dataclass(frozen=True)
class Division:
    """How a run divides its memory.

    Attributes:
      moments: most bytes of moments that are gathered in one pass.
      workers: layers searched side by side.
      at_once: pairs of a step of tuning that are computed together; 0 where nothing is tuned.
      parts: peak bytes by part.
    """

    moments: int
    workers: int
    at_once: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Predicted largest resident size, in bytes."""
        return _total(self.parts)


def divide(
    config: LatentDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, LayerInput],
    calibration: Calibration,
    *,
    limit: float | None,
    workers: int,
    tuned: int = 0,
    taught: int = 0,
    accelerated: bool = False,
) -> Division:
    """Chooses passes of the calibration, layers side by side and parts of the batches of tuning so
    that the peak fits.

    Args:
      shapes: of all parameters, by path.
      sizes: from `calibrate.trace_layers`, for the layers to quantize.
      limit: bytes that the run may take; None divides as if memory were plenty.
      workers: most layers side by side.
      tuned: pairs of one step of tuning; 0 for none.
      taught: pairs that the teacher makes together.
      accelerated: the memory is that of an accelerator: programs, and models that are not at work,
        are in the host's.

    Raises:
      DoesNotFitError: if one layer, or one pair, at a time is too much; says what would be enough.
    """
    needed = sorted((size.moment_bytes for size in sizes.values()), reverse=True)
    weights = 4 * sum(math.prod(shape) for shape in shapes.values())
    fixed = {
        "runtime": int(_RUNTIME),
        "weights": weights if accelerated else _WEIGHT_COPIES * weights,
    }
    alike = 0 if accelerated else len({shapes[path] for path in sizes})
    activations = _activations(config, sizes, calibration)

    def searching(moments: int, count: int) -> dict[str, int]:
        """Of the calibration and of the search, whichever takes more: memory of a CPU does not come
        back from one to the other."""
        group = max(
            sum(sizes[path].moment_bytes for path in paths)
            for paths in batches(dict(sizes), moments)
        )
        calibrating = {"activations": activations, "moments": _MOMENT_COPIES * group}
        matrices = _SEARCH_MATRICES + (not accelerated)  # the whole moment, in the host's memory
        search = {"search": matrices * 4 * sum(sorted(_squares(sizes))[-count:])}
        if accelerated:
            return fixed | max(calibrating, search, key=_total)
        return fixed | {"programs": int(_PROGRAMS) * alike} | calibrating | search

    # The teacher's lessons wait in the host's memory.
    lessons = 0 if accelerated else _TAUGHT * taught * 4 * math.prod(config.latent_shape)

    def tuning(pairs: int) -> dict[str, int]:
        copies = _TUNING_COPIES + (pairs < tuned)  # sums of the parts' gradients
        kept = 4 * pairs * _kept(config, sizes)
        if accelerated and needs_remat(shapes):  # XLA's code for CPUs keeps all the same
            kept = int(_REMAT_SHARE * kept)
        return fixed | {
            # Programs of the search are gone by then, but their memory is not given back.
            "programs": int(_PROGRAMS + _STEP_PROGRAMS) * alike,
            "tuning": copies * 4 * _trained(shapes) + kept + lessons,
        }

    def division(moments: int, count: int, pairs: int) -> Division:
        phases = [searching(moments, count), *([tuning(pairs)] if pairs else [])]
        return Division(moments, count, pairs, max(phases, key=_total))

    if limit is None:
        return division(min(DEFAULT_MOMENTS, sum(needed)), workers, tuned)
    least = division(1, 1, min(tuned, 1))
    if least.peak > limit:
        what = "a step of tuning" if "tuning" in least.parts else "one layer at a time"
        raise DoesNotFitError(
            f"--memory {limit / 1e9:g}: {what} takes {least.peak / 1e9:.2f} GB; "
            f"ask for {math.ceil(least.peak / 1e8) / 10:g} or more",
            needed=least.peak,
        )
    # Passes must not depend on the machine's cores: moments get their half before layers that are
    # searched beside the first one, and all of it where there is no room for a second layer.
    rest = (limit - _total(searching(1, 1))) / _MOMENT_COPIES + needed[0]
    halves = _total(searching(max(int(rest / 2), needed[0]), 2)) <= limit
    moments = int(min(rest / 2 if halves else rest, sum(needed), DEFAULT_MOMENTS))
    moments = max(moments, needed[0])
    counts = (n for n in range(workers, 0, -1) if _total(searching(moments, n)) <= limit)
    pairs = (n for n in range(tuned, 0, -1) if tuned % n == 0 and _total(tuning(n)) <= limit)
    return division(moments, next(counts, 1), next(pairs, min(tuned, 1)))


def needs_remat(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the activations of a step of tuning would take more memory than all that is trained:
    they are made again on the way back then (gradient checkpointing)."""
    return _trained(shapes) >= _REMAT_WEIGHTS


def _trained(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Weights that are tuned."""
    mine = (shape for path, shape in shapes.items() if path.partition(tree.SEPARATOR)[0] in TRAINED)
    return sum(map(math.prod, mine))


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _squares(sizes: Mapping[str, LayerInput]) -> list[int]:
    return [size.fan_in**2 for size in sizes.values()]


def _kept(config: LatentDiffusionConfig, sizes: Mapping[str, LayerInput]) -> int:
    """Numbers that the way back through the network needs of all branches of one pair.

    Of layers' inputs those before and after norms and activations; of attention its weights, twice.
    """
    unet = config.unet

    def heads(width: int) -> int:
        return unet.num_heads if unet.num_head_channels is None else width // unet.num_head_channels

    attention = sum(
        heads(size.fan_in) * size.positions**2
        for path, size in sizes.items()
        if path.endswith(("/attn1/to_q/kernel", "/qkv/kernel"))
    )
    inputs = sum(size.numbers for size in sizes.values())
    branches = 2 if config.n_classes else 1
    return branches * (_KEPT_INPUTS * inputs + _KEPT_ATTENTION * attention)


def _activations(
    config: LatentDiffusionConfig, sizes: Mapping[str, LayerInput], calibration: Calibration
) -> int:
    """Bytes of the widest place of the networks at work."""
    inputs = max(size.numbers for size in sizes.values())
    pixels = config.first_stage.resolution**2 * config.first_stage.ch
    return _ACTIVATION_COPIES * 4 * 2 * calibration.batch * max(inputs, pixels)
