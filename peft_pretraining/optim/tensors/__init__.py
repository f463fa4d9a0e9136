"""What the other parts work on: projected matrices, one parameter's update, the formats in which state is kept, and the
collectives that jobs on many matrices share. Imports of `optim`: nothing.
"""
