"""Decides which peers belong to the run, which round is open, and when it closes and why. Pure."""
