"""What a run stands on: processes, files, signals, its folder and its log."""
