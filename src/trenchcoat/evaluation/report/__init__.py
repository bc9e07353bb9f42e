"""Reports: one run, its tasks, several runs side by side."""
