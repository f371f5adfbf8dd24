"""A replica's connection to its server, and the cluster of one where there is none."""
