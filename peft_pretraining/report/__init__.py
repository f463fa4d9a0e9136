"""What runs have logged: read, mended after a resumption, compared.

Imports of the package: `checkpoint`, `flags`. Free of torch.
"""
