"""Text from a model: generation, chat, saved states."""
