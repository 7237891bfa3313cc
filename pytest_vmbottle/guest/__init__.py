"""Files in a guest, over any channel."""
