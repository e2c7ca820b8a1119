# SPDX-License-Identifier: Apache-2.0
"""`vq_conv` with 3x3 kernels on a GPU, as a product of patches that are never stored.

A vector is a kernel of one channel (G = 9), a row of it (3) or one weight (1): what is decoded for
a tile of outputs and channels serves all pixels of the tile, place by place in the window. Zeros
around the image are masks of loads, not a padded copy.

Dimension key:  O outputs   N fan-in   R pixels of a tile   T outputs of a tile
                C channels of a tile
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.kernels import gpu_arrays, pallas_decode
from vqjax.kernels import pallas_gpu as gpu
from vqjax.kernels.books import books_for
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Problem, Scaling
from vqjax.kernels.schedule import Schedule, Tiles, inner_depth
from vqjax.kernels.vq_conv import ref
from vqjax.kernels.vq_conv.window import Window, for_trial, unread


def unsupported(problem: Problem) -> list[str]:
    """Returns why no device can run a problem here; nothing if some can. Never raises."""
    return gpu.unsupported(problem) + unread(problem)


def vq_conv(
    operands: AnyOperands,
    problem: Problem,
    schedule: Schedule,
    window: Window,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes what `ref.vq_conv` or `ref.vq_conv_int8` defines, where not `unsupported`.

    Args:
      interpret: run on the CPU, tile by tile, to check the numbers.
    """
    if schedule.kind == "staged":
        w_ON = pallas_decode.decode(operands, problem, schedule.tiles, interpret=interpret)
        w_OHWI = w_ON.reshape(-1, window.size, window.size, problem.inputs)
        if isinstance(operands, IntegerOperands):
            return ref.scaled_sums(operands, w_OHWI, window)
        return ref.convolve_places(operands.x, w_OHWI, operands.bias_O, window)
    return _fused(operands, problem, schedule.tiles, window, interpret)


def try_out(problem: Problem, schedule: Schedule) -> None:
    """Runs a problem with random operands, on the default device; raises what it meets."""
    window, image = for_trial(problem)
    run = functools.partial(vq_conv, window=window)
    shape = (1, *image, problem.inputs)
    gpu_arrays.try_out(run, ref.definition(problem, window), problem, schedule, shape)


def _fused(
    operands: AnyOperands, problem: Problem, tiles: Tiles, window: Window, interpret: bool
) -> jax.Array:
    batch, height, width, inputs = operands.x.shape
    image = (height, width)
    depth = inner_depth(tiles, problem)
    steps = -(-inputs // (depth * tiles.splits))
    books = books_for(problem, staged=False)
    kernel = functools.partial(
        _kernel,
        problem=books.problem,
        tiles=tiles,
        image=image,
        window=window,
        depth=depth,
        steps=steps,
        sums=books.sums,
    )
    scaling = operands.scaling()
    y = gpu.launch(
        kernel,
        (
            operands.x.reshape(-1, inputs),
            operands.packed_OY,
            books.table_of(operands),
            *(array for array in scaling if array is not None),
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_conv",
        interpret=interpret,
    )
    y = gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)
    return y.reshape(batch, *window.outputs(image), problem.outputs)


def _kernel(x_ref, packed_ref, books_ref, *refs, problem, tiles, image, window, depth, steps, sums):
    *scaling_refs, y_ref = refs
    pixels_R = gpu.indices(gpu.pl.program_id(0) * tiles.rows, tiles.rows)
    outputs_T = gpu.indices(gpu.pl.program_id(1) * tiles.outputs, tiles.outputs)
    split = gpu.pl.program_id(2)
    height, width = window.outputs(image)
    line_R, x_R = gpu.divide(pixels_R, width)
    image_R, y_R = gpu.divide(line_R, height)
    first_R = image_R * image[0]  # line of the batch where an image begins
    top_R = y_R * window.strides[0] - window.padding[0][0]
    left_R = x_R * window.strides[1] - window.padding[1][0]
    in_channel = problem.window**2 // problem.group  # vectors that read one channel

    def x_tile(place, channels_C):
        """What the pixels see at one place of the window, zeros outside the image."""
        down, right = gpu.divide(place, problem.window)
        y_R, x_R = top_R + down, left_R + right
        seen_R = (pixels_R < problem.rows) & (y_R >= 0) & (y_R < image[0])
        seen_R &= (x_R >= 0) & (x_R < image[1])
        at_R = (first_R + y_R) * image[1] + x_R
        seen_RC = seen_R[:, None] & (channels_C < problem.inputs)[None]
        return gpu.load(x_ref, (at_R[:, None], channels_C[None]), seen_RC)

    def add_tile(step, total_RT):
        channels_C = gpu.indices((split * steps + step) * depth, depth)
        for vector in range(in_channel):
            codes_M = gpu.read_codes(
                packed_ref, outputs_T, channels_C * in_channel + vector, problem
            )

            def add_place(place, total_RT, codes_M=codes_M, vector=vector):
                at = jnp.full((1, 1), place, jnp.int32)
                w_TC = gpu.sum_entries(books_ref, [(at, code_TC) for code_TC in codes_M], sums)
                x_RC = x_tile(vector * problem.group + place, channels_C)
                return total_RT + gpu.product(x_RC, w_TC)

            total_RT = jax.lax.fori_loop(0, problem.group, add_place, total_RT)
        return total_RT

    total_RT = jax.lax.fori_loop(
        0, steps, add_tile, jnp.zeros((tiles.rows, tiles.outputs), problem.sums)
    )
    scaling = Scaling(*scaling_refs)
    gpu.finish(y_ref, total_RT, pixels_R, outputs_T, split, scaling, problem, tiles)
