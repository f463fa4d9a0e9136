"""What runs have logged, compared; and what a run will need, simulated before it is launched.

Imports of the package: `checkpoint`, `config`, `distributed`, `flags`, `methods`, `models`, `optim`, `runtime`,
`training`. The comparison is free of torch.
"""
