"""Infrastructure of a run: processes, files, signals, its folder and its log."""
