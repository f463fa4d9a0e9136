"""What an optimizer holds: parameter groups and their settings, each parameter's objects and state, and how these are
loaded and reset. Imports of `optim`: `basis`, `rules`, `tensors`.
"""
