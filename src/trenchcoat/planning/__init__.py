"""Memory and time estimates from sizes alone."""
