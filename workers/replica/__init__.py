"""Model, optimizer and step: what is equal on every machine."""

from workers.replica.replica import Replica

__all__ = ["Replica"]
