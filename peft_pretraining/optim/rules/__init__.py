"""How a weight moves: update rules, which make a direction of a gradient, and lifts, which bring it back to the whole
weight. Imports of `optim`: `tensors`.
"""
