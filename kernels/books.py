# SPDX-License-Identifier: Apache-2.0
"""Codebooks as GPU kernels read them: neighbouring codes of int8 codebooks are read as one.

The bits of C codes that follow each other are those of one number, code[0] + K code[1] + ...: the
same bytes are codes of fewer codebooks, whose entries are all sums of those that they replace. Four
look-ups among 16 entries become two among 256, three become one among 4096. Sums of int8 are whole
numbers that float16 holds exactly; sums of other entries are not, and those codebooks are read as
they are.

Dimension key:  M codebooks   K entries   G weights of a vector   B codebooks after merging (M / C)
                E entries of all of them   P weights of a vector, up to a power of two
                O outputs
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.kernels.problem import AnyOperands, Prepared, Problem, factors, power_of_two

CODE_BITS = (*range(1, 11), 12)
"""Of codes that lie within two bytes wherever they begin: 11 bits can take three."""

_MOST_BYTES = 65_536
"""Of all entries: they are gathered from a multiprocessor's first cache, which others use too."""


def flat_books(codebooks_MKG: jax.Array) -> jax.Array:
    """Returns the codebooks below each other with rows of a power of two, [E, P].

    Rows that begin at multiples of their size are read whole; values of a kernel need sizes of a
    power of two.
    """
    books, entries, group = codebooks_MKG.shape
    books_EG = codebooks_MKG.reshape(books * entries, group)
    return jnp.pad(books_EG, ((0, 0), (0, power_of_two(group) - group)))


class Books(NamedTuple):
    """How the vectors of a problem are looked up.

    Attributes:
      problem: the same problem on the same bytes, its codebooks merged, of the type that is read.
      count: C, codebooks that one replaces.
      sums: type in which entries are added up.
      by_place: whether numbers of one place in their vectors lie side by side.
    """

    problem: Problem
    count: int
    sums: str
    by_place: bool = False

    @property
    def kind(self) -> tuple:
        """What the tables of one weight differ by."""
        return self.count, self.problem.codebook_dtype, self.by_place

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the table."""
        return power_of_two(self.problem.group) * jnp.dtype(self.problem.codebook_dtype).itemsize

    def prepare(
        self, codebooks_MKG: jax.Array, scales_O: jax.Array, codebook_scale: jax.Array | None
    ) -> Prepared:
        """Returns what kernels read beside the codes."""
        factors_O = factors(scales_O, codebook_scale)
        return Prepared(factors_O, self.table(codebooks_MKG), self.kind)

    def table_of(self, operands: AnyOperands) -> jax.Array:
        """Returns `table`, as it was prepared or made now."""
        prepared = operands.prepared
        if prepared is not None and prepared.kind == self.kind:
            return prepared.table
        return self.table(operands.codebooks_MKG)

    def table(self, codebooks_MKG: jax.Array) -> jax.Array:
        """Returns the entries below each other with rows of a power of two, [E, P], or [P, E]."""
        table_EP = self._table(codebooks_MKG)
        return table_EP.T if self.by_place else table_EP

    def _table(self, codebooks_MKG: jax.Array) -> jax.Array:
        dtype = self.problem.codebook_dtype
        if dtype == codebooks_MKG.dtype and self.count == 1:
            return flat_books(codebooks_MKG)
        books, entries, group = codebooks_MKG.shape
        books_BCKG = codebooks_MKG.astype(jnp.int32).reshape(-1, self.count, entries, group)
        sums_BKG = books_BCKG[:, 0]
        for place in range(1, self.count):  # a later code has the higher digit
            sums_BKKG = books_BCKG[:, place, :, None] + sums_BKG[:, None]
            sums_BKG = sums_BKKG.reshape(books // self.count, -1, group)
        return flat_books(sums_BKG.astype(dtype))


def books_for(problem: Problem, *, staged: bool) -> Books:
    """Returns how the kernels of a schedule look the vectors of a problem up.

    Args:
      staged: the kernel decodes a whole weight, and does not multiply by it.
    """
    if staged:
        return books_of(problem, rounded=problem.integer)
    if problem.window == 1:
        return books_of(problem, rounded=True)
    # Entries of one place are read together, and a warp gathers them from few lines.
    return books_of(problem, rounded=True, most=256)._replace(by_place=True)


def books_of(problem: Problem, *, rounded: bool, most: int = 4096) -> Books:
    """Returns how kernels look the vectors of a problem up: with the fewest codes.

    Args:
      rounded: weights are the sums in the type of x, not something that is computed from them.
      most: entries that a merged codebook may have.
    """
    unmerged = Books(problem, 1, problem.sums)
    if problem.codebook_dtype != "int8":
        return unmerged
    size = 1 if problem.integer else 2
    for count in range(problem.books, 0, -1):
        books, bits = problem.books // count, problem.code_bits * count
        if problem.books % count or bits not in CODE_BITS or (count > 1 and 1 << bits > most):
            continue
        if (books * power_of_two(problem.group) << bits) * size <= _MOST_BYTES:
            dtype, sums = _types(problem, books, count, rounded)
            sizes = {"books": books, "entries": 1 << bits, "codebook_dtype": dtype}
            return Books(dataclasses.replace(problem, **sizes), count, sums)
    return unmerged


def _types(problem: Problem, books: int, count: int, rounded: bool) -> tuple[str, str]:
    """Of entries and of their sums: what loses nothing beyond one rounding to the type of x."""
    if problem.integer:  # weights are int8: so are entries and sums, modulo 256
        return "int8", "int8"
    # float16 has all whole numbers up to 2^11, bfloat16 those up to 2^8: sums of two int8. A sum
    # of two such entries, or an entry that is the only one, is rounded once.
    once = books == 1 or (books == 2 and count <= 2)
    if rounded and (problem.dtype == "float16" or (problem.dtype == "bfloat16" and once)):
        return problem.dtype, problem.dtype
    return "float16", "float32"
