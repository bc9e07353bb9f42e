"""The commands, one file each: its help, its options and its action, together in ``COMMAND``."""
