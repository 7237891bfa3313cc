"""The machine of a test, and its verbs."""
