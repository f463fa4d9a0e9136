"""LLaMA models: building, naming the layers that methods act on, exporting."""
