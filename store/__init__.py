"""Checkpoints of training runs in a folder: what STORE.md specifies."""
