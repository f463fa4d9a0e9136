"""Which subspace a gradient is projected onto: the basis rules, decompositions that they use, and `Subspace`, which
changes one weight's bases in time. Imports of `optim`: `rules`, `tensors`.
"""
