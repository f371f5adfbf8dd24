"""Model, optimizer and step: the state that is equal on every machine."""

from .replica import Replica

__all__ = ["Replica"]
