"""Reports: of one run, of its tasks, of runs side by side."""
