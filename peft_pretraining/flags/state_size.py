"""How many elements of optimizer state a method keeps for a matrix: the formula of its spec, and what that comes to."""

from __future__ import annotations

import re
from collections.abc import Mapping


def elements(formula: str, sizes: Mapping[str, float]) -> int:
    """The value of a spec's `state`: a sum of products such as 2mr, or of one over a number or a letter, such as mn/b.

    `sizes` are those of the letters m, n, r and of the method's own, of `outputs` (the matrix's rows, be they m or n)
    and `blocks` (its attention heads, or rows). Raises `ValueError` for what is no such sum.

    >>> elements("mr + 2nr + 1", {"m": 3, "n": 5, "r": 2})
    27
    >>> elements("2mn/b + outputs", {"m": 4, "n": 8, "b": 4, "outputs": 8})
    24
    """
    total = 0.0
    for term in formula.replace(" ", "").split("+"):
        parts = re.fullmatch(r"(\d*)(outputs|blocks|[a-z]*)(?:/(\d+|[a-z]))?", term)
        if not parts or not term:
            raise ValueError(f"{formula!r} is no sum of products of {', '.join(sizes)}")
        number, letters, divisor = parts.groups()
        product = float(number or 1)
        try:
            for letter in [letters] if letters in ("outputs", "blocks") else letters:
                product *= sizes[letter]
            total += product / (1 if divisor is None else float(divisor) if divisor.isdigit() else sizes[divisor])
        except KeyError as error:
            raise ValueError(f"{formula!r} is no sum of products of {', '.join(sizes)}: {error}") from None
    return int(total)
