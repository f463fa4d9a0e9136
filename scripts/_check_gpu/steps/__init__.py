"""What is tried. Every function takes a `Scene`, `Lines` to write to and the case, and has a process of its own."""
