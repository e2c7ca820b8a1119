# SPDX-License-Identifier: Apache-2.0
"""Operations of the dense product and of lookup tables, and when tables take fewer."""

from vqjax.kernels.problem import Problem


def dense(rows: int, fan_in: int, outputs: int) -> int:
    """Returns 2 N O P, see `lut_matmul.ref`."""
    return 2 * fan_in * outputs * rows


def lookup(rows: int, groups: int, group: int, books: int, entries: int, outputs: int) -> int:
    """Returns 2 (J G) M K P for the tables and M J O P for the sums, see `lut_matmul.ref`."""
    return rows * groups * books * (2 * group * entries + outputs)


def operations(problem: Problem) -> tuple[int, int]:
    """Returns both for the sizes of a problem."""
    sizes = problem.groups, problem.group, problem.books, problem.entries, problem.outputs
    products = dense(problem.rows, problem.fan_in, problem.outputs)
    return products, lookup(problem.rows, *sizes)


def refusal(problem: Problem) -> str | None:
    """Returns why a problem is not for lookup tables, or None where they save operations."""
    if problem.integer:
        return "lookup tables hold products in floating point, this is one of integers"
    if problem.group == 1:
        return "vectors of one weight, whose tables hold what the dense product multiplies"
    products, tables = operations(problem)
    if tables < products:
        return None
    return f"lookup tables take {tables / products:.2f} times the operations of the dense product"
