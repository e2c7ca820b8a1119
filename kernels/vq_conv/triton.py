# SPDX-License-Identifier: Apache-2.0
"""`vq_conv` in Triton: the algorithm of `vq_conv.pallas`, for GPUs that Pallas leaves out.

Importing this needs triton (`triton_gpu.missing`).

Dimension key:  O outputs   N fan-in   R pixels of a tile   T outputs of a tile
                C channels of a tile
"""

import functools

import jax
import triton.language as tl  # pyright: ignore[reportMissingImports]

from vqjax.kernels import gpu_arrays, triton_decode, triton_gpu
from vqjax.kernels.books import books_for
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, inner_depth
from vqjax.kernels.triton_decode import add_product, finish, jit, read_codes, sum_places
from vqjax.kernels.vq_conv import ref
from vqjax.kernels.vq_conv.window import Window, for_trial


def vq_conv(
    operands: AnyOperands,
    problem: Problem,
    schedule: Schedule,
    window: Window,
    *,
    capability: int | None = None,
) -> jax.Array:
    """Computes what `ref.vq_conv` or `ref.vq_conv_int8` defines, where the dispatcher does not
    refuse.

    Args:
      capability: as `triton_gpu.launch` takes it.
    """
    if schedule.kind == "staged":
        w_ON = triton_decode.decode(operands, problem, schedule.tiles, capability=capability)
        w_OHWI = w_ON.reshape(-1, window.size, window.size, problem.inputs)
        if isinstance(operands, IntegerOperands):
            return ref.scaled_sums(operands, w_OHWI, window)
        return ref.convolve_places(operands.x, w_OHWI, operands.bias_O, window)
    return _fused(operands, problem, schedule.tiles, window, capability)


def try_out(problem: Problem, schedule: Schedule) -> None:
    """Runs a problem with random operands, on the default device; raises what it meets."""
    window, image = for_trial(problem)
    run = functools.partial(vq_conv, window=window)
    shape = (1, *image, problem.inputs)
    gpu_arrays.try_out(run, ref.definition(problem, window), problem, schedule, shape)


def _fused(
    operands: AnyOperands, problem: Problem, tiles: Tiles, window: Window, capability: int | None
) -> jax.Array:
    batch, height, width, inputs = operands.x.shape
    lines, columns = window.outputs((height, width))
    scaling = operands.scaling()
    books = books_for(problem, staged=False)
    depth = inner_depth(tiles, problem)
    y = triton_gpu.launch(
        conv_kernel,
        (
            operands.x,
            operands.packed_OY,
            books.table_of(operands),
            *triton_decode.scaling_operands(scaling),
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_conv",
        constants=triton_decode.code_constants(books)
        | {
            "ROWS": problem.rows,
            "INPUTS": inputs,
            "GROUP": problem.group,
            "SPLITS": tiles.splits,
            "STEPS": -(-inputs // (depth * tiles.splits)),
            "PRODUCTS": getattr(tl, problem.sums),
            "WINDOW": window.size,
            "HEIGHT": height,
            "WIDTH": width,
            "LINES": lines,
            "COLUMNS": columns,
            "DOWN": window.strides[0],
            "RIGHT": window.strides[1],
            "ABOVE": window.padding[0][0],
            "BEFORE": window.padding[1][0],
            "TILE_R": tiles.rows,
            "TILE_T": tiles.outputs,
            "TILE_C": depth,
        },
        capability=capability,
    )
    y = gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)
    return y.reshape(batch, lines, columns, problem.outputs)


@jit
def conv_kernel(
    x_ptr, packed_ptr, books_ptr,
    factors_ptr, biases_ptr, steps_ptr, zeros_ptr, totals_ptr, y_ptr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, BITS: tl.constexpr, IN_TWO: tl.constexpr, SUMS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, PRODUCTS: tl.constexpr, WINDOW: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, ABOVE: tl.constexpr, BEFORE: tl.constexpr,
    TILE_R: tl.constexpr, TILE_T: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    pixels_R = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    outputs_T = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    split = tl.program_id(2)
    line_R = pixels_R // COLUMNS
    first_R = line_R // LINES * HEIGHT  # line of the batch where an image begins
    top_R = line_R % LINES * DOWN - ABOVE
    left_R = pixels_R % COLUMNS * RIGHT - BEFORE
    IN_CHANNEL: tl.constexpr = WINDOW * WINDOW // GROUP  # vectors that read one channel
    total_RT = tl.zeros((TILE_R, TILE_T), PRODUCTS)
    for step in range(STEPS):
        channels_C = (split * STEPS + step) * TILE_C + tl.arange(0, TILE_C)
        for vector in tl.static_range(IN_CHANNEL):
            codes_M = read_codes(
                packed_ptr, outputs_T, channels_C * IN_CHANNEL + vector,
                OUTPUTS, GROUPS, BYTES, BOOKS, ENTRIES, BITS, IN_TWO,
            )  # fmt: skip
            for place in range(GROUP):
                w_TC = sum_places(books_ptr, codes_M, place, BOOKS, ENTRIES, SUMS)
                at = vector * GROUP + place
                y_R = top_R + at // WINDOW
                x_R = left_R + at % WINDOW
                # Zeros around the image are masks of loads, not a padded copy.
                seen_R = (pixels_R < ROWS) & (y_R >= 0) & (y_R < HEIGHT)
                seen_R = seen_R & (x_R >= 0) & (x_R < WIDTH)
                at_RC = ((first_R + y_R) * WIDTH + x_R)[:, None] * INPUTS + channels_C[None, :]
                seen_RC = seen_R[:, None] & (channels_C < INPUTS)[None, :]
                x_RC = tl.load(x_ptr + at_RC, mask=seen_RC, other=0)
                total_RT = add_product(x_RC, w_TC, total_RT)
    finish(
        y_ptr, factors_ptr, biases_ptr, steps_ptr, zeros_ptr, totals_ptr,
        total_RT, pixels_R, outputs_T, split, ROWS, OUTPUTS, SPLITS,
    )  # fmt: skip
