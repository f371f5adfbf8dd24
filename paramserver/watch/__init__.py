"""Watching a run from a terminal, on any machine: `python -m paramserver.watch`."""
