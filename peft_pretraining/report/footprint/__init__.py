"""An update simulated on the meta device: memory, launches, waits and traffic of a run before it is launched."""
