"""A whole cluster from one command: on this machine, or on the nodes of a Ray cluster."""
