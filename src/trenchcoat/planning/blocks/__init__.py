"""Planning of attention transfer block by block: block size, pass length, and the ways to run it."""
