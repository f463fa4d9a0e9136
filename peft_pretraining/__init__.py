"""Memory-efficient pre-training of LLaMA models: one code base, one flag to choose the method."""

__version__ = "0.1.0"
