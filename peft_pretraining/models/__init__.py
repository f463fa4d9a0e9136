"""LLaMA from its JSON description or saved weights: its shape, its target layers, its loss.

Imports of the package: `distributed`, `flags`, `rng`, `runtime`. Its shape is read without torch.
"""
