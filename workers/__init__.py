"""Workers: replicas of the run's model that compute gradients. See `workers.cluster`."""

from workers.cluster import Cluster, RunLost, UserError, join

__all__ = ["Cluster", "RunLost", "UserError", "join"]
