"""Option tasks for causal language models: an example is a prompt with options, of which one is right."""
