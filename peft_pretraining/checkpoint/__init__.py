"""A run's folder and the checkpoints in it: what is on disk, whose it is, whether it is whole, writing and reading it.

Imports of the package: `distributed`, `flags`, `methods`, `nn`, `optim`, `runtime`. What says which run a folder
holds is free of torch.
"""
