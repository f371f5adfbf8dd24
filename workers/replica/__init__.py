"""Model, optimizer and step: the state that is equal on every machine."""

from workers.replica.replica import Replica

__all__ = ["Replica"]
