"""From a checkpoint to what other programs use: the merged model, an adapter for PEFT, the model card.

Imports of the package: `checkpoint`, `config`, `data`, `flags`, `methods`, `models`, `nn`.
"""
