# SPDX-License-Identifier: Apache-2.0
"""When lookup tables take fewer operations than the dense product.

`core.flops` counts the same for plans, before there are arrays.
"""

from vqjax.kernels.problem import Problem


def operations(problem: Problem) -> tuple[int, int]:
    """Returns the operations of the dense product and of lookup tables; see `lut_matmul.ref`."""
    dense = 2 * problem.fan_in * problem.outputs * problem.rows
    vectors = problem.groups * problem.books * problem.rows
    return dense, vectors * (2 * problem.group * problem.entries + problem.outputs)


def refusal(problem: Problem) -> str | None:
    """Returns why lookup tables save nothing in a problem, or None where they do."""
    if problem.group == 1:
        return "vectors of one weight, whose tables hold what the dense product multiplies"
    dense, lookup = operations(problem)
    if lookup < dense:
        return None
    return f"lookup tables take {lookup / dense:.2f} times the operations of the dense product"
