"""This host: files, locks, processes, signals and resources."""
