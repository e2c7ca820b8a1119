# SPDX-License-Identifier: Apache-2.0
"""How much memory a run takes at its peak, part by part, and how to stay below a limit.

What a run does follows from the limit and from shapes alone, never from what happens to be free:
the same command must give the same bytes everywhere.
"""

import dataclasses
import math
from collections.abc import Mapping

from vqjax.config import LatentDiffusionConfig
from vqjax.errors import DoesNotFitError
from vqjax.pipeline.calibrate import LayerInput, batches
from vqjax.settings import Calibration

DEFAULT_MOMENTS = 4_000_000_000  # bytes of moments side by side where nobody set a limit

_RUNTIME = 0.7e9  # interpreter, libraries, and the programs that every run compiles
_PROGRAMS = 42e6  # of one shape of kernel: code, traces, and what compiling them left behind
_STEP_PROGRAMS = 58e6  # more, where it is tuned: they are compiled beside each other
_WEIGHT_COPIES = 3  # full precision, quantized, and the scalar baseline
_MOMENT_COPIES = 2  # sums or what was read, and what is written
_SEARCH_MATRICES = 8  # of one layer, fan-in by fan-in: moment, metric, factors, their workspace
_ACTIVATION_COPIES = 4  # of the largest layer's inputs, in and around it
_TUNING_COPIES = 11  # of the weights: teacher, student, gradients, moments, targets, codes, updates


@dataclasses.dataclass(frozen=True)
class Division:
    """How a run divides its memory.

    Attributes:
      moments: most bytes of moments that are gathered in one pass.
      workers: layers searched side by side.
      parts: peak bytes by part.
    """

    moments: int
    workers: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Predicted largest resident size, in bytes."""
        return sum(self.parts.values())


def divide(
    config: LatentDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, LayerInput],
    calibration: Calibration,
    *,
    limit: float | None,
    workers: int,
    tuned: int = 0,
) -> Division:
    """Chooses passes of the calibration and layers side by side so that the peak fits.

    Args:
      shapes: of all parameters, by path.
      sizes: from `calibrate.trace_layers`, for the layers to quantize.
      limit: bytes that the run may take; None divides as if memory were plenty.
      workers: most layers side by side.
      tuned: pairs of one step of tuning; 0 for none.

    Raises:
      DoesNotFitError: if one layer at a time is too much; says what would be enough.
    """
    needed = sorted((size.moment_bytes for size in sizes.values()), reverse=True)
    weights = sum(math.prod(shape) for shape in shapes.values())
    fixed = {"runtime": int(_RUNTIME), "weights": _WEIGHT_COPIES * 4 * weights}
    programs = int(_PROGRAMS) * len({shapes[path] for path in sizes})
    activations = _activations(config, sizes, calibration)
    tuning = {}
    if tuned:
        kept = 4 * (_TUNING_COPIES * weights + _kept(sizes, tuned))
        # Programs of the search are gone by then, but their memory is not given back.
        more = int(_STEP_PROGRAMS) * len({shapes[path] for path in sizes})
        tuning = {"programs": programs + more, "tuning": kept}

    def parts(moments: int, count: int) -> dict[str, int]:
        """Of the search or of the tuning that follows it, whichever takes more."""
        group = max(
            sum(sizes[path].moment_bytes for path in paths)
            for paths in batches(dict(sizes), moments)
        )
        search = _SEARCH_MATRICES * 4 * sum(sorted(_squares(sizes))[-count:])
        searching = {"programs": programs, "activations": activations}
        searching |= {"moments": _MOMENT_COPIES * group, "search": search}
        return fixed | max(searching, tuning, key=lambda phase: sum(phase.values()))

    if limit is None:
        moments = min(DEFAULT_MOMENTS, sum(needed))
        return Division(moments, workers, parts(moments, workers))
    least = sum(parts(1, 1).values())
    if least > limit:
        raise DoesNotFitError(
            f"--memory {limit / 1e9:g}: {_what(parts(1, 1))} takes {least / 1e9:.2f} GB; "
            f"ask for {math.ceil(least / 1e8) / 10:g} or more"
        )
    # Passes must not depend on the machine's cores: moments get their half before layers that are
    # searched beside the first one.
    rest = (limit - least) / _MOMENT_COPIES + needed[0]
    moments = int(min(max(rest / 2, needed[0]), sum(needed), DEFAULT_MOMENTS))
    moments = max(moments, needed[0])
    counts = (n for n in range(workers, 0, -1) if sum(parts(moments, n).values()) <= limit)
    count = next(counts, 1)
    return Division(moments, count, parts(moments, count))


def _squares(sizes: Mapping[str, LayerInput]) -> list[int]:
    return [size.fan_in**2 for size in sizes.values()]


def _what(parts: Mapping[str, int]) -> str:
    """What needs the memory that cannot be divided any further."""
    return "a step of tuning" if "tuning" in parts else "one layer at a time"


def _kept(sizes: Mapping[str, LayerInput], pairs: int) -> int:
    """Numbers that the way back through the network needs of both branches of some pairs.

    Twice the inputs of all layers: before their norm and after it.
    """
    return 2 * 2 * pairs * sum(size.numbers for size in sizes.values())


def _activations(
    config: LatentDiffusionConfig, sizes: Mapping[str, LayerInput], calibration: Calibration
) -> int:
    """Bytes of the widest place of the networks at work."""
    inputs = max(size.numbers for size in sizes.values())
    pixels = config.first_stage.resolution**2 * config.first_stage.ch
    return _ACTIVATION_COPIES * 4 * 2 * calibration.batch * max(inputs, pixels)
