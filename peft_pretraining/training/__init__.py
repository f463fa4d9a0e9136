"""A pre-training run: its objects are built, started from where it stands, trained, evaluated and logged.

Imports of the package: `checkpoint`, `config`, `data`, `distributed`, `flags`, `methods`, `models`, `nn`, `optim`,
`rng`, `runtime`.
"""
