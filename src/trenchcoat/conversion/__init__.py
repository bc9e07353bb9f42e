"""Both stages of a conversion, end to end."""
