"""Starting runs: recipes, the torchrun command that runs one, and torchrun with the exit codes of its processes.

Imports of the package: `config`, `flags`, `methods`, `report`, `runtime`. Free of torch but for `torchrun`.
"""
