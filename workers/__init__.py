"""Workers: replicas of the run's model that compute gradients. See `workers.cluster`."""

from workers.cluster import Cluster, join

__all__ = ["Cluster", "join"]
