"""Text generation, chat, saved states."""
