"""Fine-tuning: the training methods through transformers' `Trainer`, on GLUE and option tasks.

Imports of the package: `checkpoint`, `config`, `data`, `distributed`, `flags`, `methods`, `models`, `optim`, `rng`,
`runtime`, `training`.
"""
