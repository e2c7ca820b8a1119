# SPDX-License-Identifier: Apache-2.0
"""How a GPU kernel cuts its work into tiles, by rules of arithmetic.

Two schedules. "fused": every program decodes the weights that it multiplies, so that they pass
through memory as codes; a weight is decoded once per tile of rows. "staged": a first kernel decodes
each weight once, into a buffer that lives as long as the layer runs, and a dense product of XLA
uses it for all rows. Few rows wait for weights to be read, and the first reads 2 bits of each; many
rows wait for arithmetic, and the second leaves that to the vendor's library.

No rule here was measured; a tuned table (`kernels.dispatch`) replaces them by device.
"""

import dataclasses

from vqjax.kernels.books import books_of
from vqjax.kernels.problem import Problem, power_of_two

FUSED_ROWS = 256
"""Most rows that the rules give to the fused schedule: its tiles then decode a weight twice."""

FUSED_ROWS_FLOAT32 = 32
"""The same in float32, which tensor cores do not multiply, and of all types where they do not: for
more rows arithmetic takes longer than to read a decoded weight (28 on an H200, 20 on an A100), and
registers hold no such tiles."""

_LEAST = 16  # side of the smallest matrix product on tensor cores
_MOST_ROWS = 128
_PROGRAMS = 128  # about one for every multiprocessor of the GPUs in question
_MOST_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of what one program computes; powers of two, but for `splits`.

    Attributes:
      rows: output rows or pixels, 16 or more.
      outputs: output channels, 16 or more.
      depth: length of each inner product that is added up, 16 or more: weights of a row and the
        padding of their vectors, or vectors of it where each place of a vector is multiplied by
        itself.
      splits: programs that share one tile of the output, each for a part of the inputs.
      warps, stages: as the Triton compiler takes them.
    """

    rows: int
    outputs: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 2

    def problems(self) -> list[str]:
        """Returns what is wrong with the fields, one line each."""
        found = []
        for name in ("rows", "outputs", "depth", "warps"):
            value, least = getattr(self, name), 1 if name == "warps" else _LEAST
            if not isinstance(value, int) or value < least or value & (value - 1):
                found.append(f"{name} {value!r}, expected a power of two from {least}")
        for name in ("splits", "stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                found.append(f"{name} {value!r}, expected a whole number from 1")
        return found


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Attributes:
    kind: "fused" or "staged".
    tiles: of the fused kernel, or of the one that decodes.
    """

    kind: str
    tiles: Tiles

    def __str__(self) -> str:
        t = self.tiles
        return f"{self.kind}, tiles {t.rows}x{t.outputs}x{t.depth}, {t.splits} splits"


def smallest(rows: int = _LEAST) -> tuple[Schedule, Schedule]:
    """Returns both schedules with the least work for a compiler, for tiles of so many rows."""
    fused = Tiles(max(power_of_two(rows), _LEAST), _LEAST, _LEAST)
    return Schedule("fused", fused), Schedule("staged", Tiles(_LEAST, _LEAST, _LEAST))


def one_tile(problem: Problem, made: Schedule | None) -> tuple[Problem, Schedule | None]:
    """Returns a problem of a single tile of the output, and its schedule, to be tried.

    Its kernel has the code, registers and shared memory of the whole problem's, and takes no time
    to run. Of splits, which repeat a program, there is one.

    Args:
      made: the schedule of the whole problem; None for paths that have none, which know no tiles.
    """
    tiles = made.tiles if made else Tiles(_LEAST, _LEAST, _LEAST)
    depth = inner_depth(tiles, problem)
    in_step = depth if problem.window > 1 else vectors_of(depth, problem) * problem.group
    small = dataclasses.replace(
        problem,
        rows=tiles.rows,
        inputs=2 * in_step,  # a loop stays one
        outputs=tiles.outputs,
        strides=(1, 1),
    )
    return small, made and Schedule(made.kind, dataclasses.replace(tiles, splits=1))


def inner_depth(tiles: Tiles, problem: Problem) -> int:
    """Returns the length of the inner products: of int8, tensor cores take 32 numbers at least."""
    return max(tiles.depth, 32) if problem.integer else tiles.depth


def vectors_of(depth: int, problem: Problem) -> int:
    """Returns how many vectors lie side by side in a depth, each filled up to a power of two."""
    return max(depth // power_of_two(problem.group), 1)


def bias_dtype(problem: Problem, schedule: Schedule | None) -> str:
    """Returns the type in which a path reads biases as they are, as a sampler holds them.

    That of x where a convolution is cuDNN's, of a weight that was decoded before it; float32 beside
    sums of products.
    """
    staged = schedule is not None and schedule.kind == "staged"
    return problem.dtype if staged and problem.window > 1 and not problem.integer else "float32"


def by_rule(problem: Problem, tensor_cores: bool = True) -> Schedule:
    """Returns the schedule of a problem, from its sizes and from what multiplies it.

    Args:
      tensor_cores: whether the device multiplies tiles by them where the type allows it.
    """
    if problem.rows > (FUSED_ROWS if _on_cores(problem, tensor_cores) else FUSED_ROWS_FLOAT32):
        return Schedule("staged", Tiles(_LEAST, 32, 128))
    return _fused(problem, 32 if problem.rows <= 32 else 64, _depth(problem, tensor_cores))


def _depth(problem: Problem, tensor_cores: bool) -> int:
    """Registers hold half as much without tensor cores, and of vectors that are read place by
    place."""
    return 64 if problem.window == 1 and _on_cores(problem, tensor_cores) else 32


def _on_cores(problem: Problem, tensor_cores: bool) -> bool:
    return tensor_cores and problem.dtype != "float32"


def _fused(problem: Problem, outputs: int, depth: int) -> Schedule:
    """Tiles as tall as they can be: each tile of rows decodes the weight again."""
    rows = min(max(power_of_two(problem.rows), _LEAST), _MOST_ROWS)
    programs = -(-problem.rows // rows) * -(-problem.outputs // outputs)
    wanted = min(_MOST_SPLITS, -(-_PROGRAMS // programs))
    steps = -(-_tiles_of_inputs(problem, depth) // wanted)  # of a program
    splits = -(-_tiles_of_inputs(problem, depth) // steps)  # all that these leave work for
    warps = 8 if rows > 64 else 4
    return Schedule("fused", Tiles(rows, outputs, depth, splits, warps, _stages(problem)))


def _tiles_of_inputs(problem: Problem, depth: int) -> int:
    if problem.window > 1:
        return -(-problem.inputs // depth)
    return -(-problem.groups // vectors_of(depth, problem))


def _stages(problem: Problem) -> int:
    """What a loop prefetches it copies by `cp.async`, and 16 bytes or more of a row by a variant
    that passes over a multiprocessor's first cache, where codebooks should stay."""
    whole_vectors = problem.window == 1
    return 1 if whole_vectors and books_of(problem, rounded=True).row_bytes >= 16 else 2


def candidates(problem: Problem, tensor_cores: bool = True) -> tuple[Schedule, ...]:
    """Returns schedules worth timing beside a weight that was decoded at load: that of the rules,
    and fused ones around it.

    The staged schedule decodes first and then does the same as a decoded weight, so that its tiles
    decide nothing; and where the rules choose it, fused ones wait for the same arithmetic.

    Args:
      tensor_cores: as for `by_rule`.
    """
    rule = by_rule(problem, tensor_cores)
    depth_by_rule = _depth(problem, tensor_cores)
    if rule.kind == "staged":
        return (rule,)
    made = [
        dataclasses.replace(tiles, splits=splits, stages=stages)
        for outputs in (32, 64)
        for depth in (depth_by_rule // 2, depth_by_rule)
        for tiles in [_fused(problem, outputs, depth).tiles]
        for splits in (tiles.splits, 1)  # with one, nothing is added up afterwards
        for stages in (1, 2)
    ]
    return tuple(dict.fromkeys([rule, *(Schedule("fused", tiles) for tiles in made)]))
