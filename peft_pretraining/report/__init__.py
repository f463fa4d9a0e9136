"""What runs have logged, as tables, figures and a page; and what a run will need, simulated before it is launched.

Imports of the package: `checkpoint`, `config`, `distributed`, `flags`, `methods`, `models`, `optim`, `runtime`,
`training`. Reports and comparisons are free of torch.
"""
