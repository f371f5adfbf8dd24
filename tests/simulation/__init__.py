"""Whole runs in virtual time, with faults, thousands a minute; see `schedule`."""

from .book import Broken
from .schedule import Outcome, Parts, Schedule, simulate

__all__ = ["Broken", "Outcome", "Parts", "Schedule", "simulate"]
