"""Reports of a run, made of its artifacts: a page, a trace, and words."""
