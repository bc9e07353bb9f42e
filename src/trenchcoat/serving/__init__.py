"""Serving a linearized model: an OpenAI server of its own, and vLLM's."""
