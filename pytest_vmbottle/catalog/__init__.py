"""The catalog: the folder that all workers and runs share."""
