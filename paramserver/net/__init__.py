"""Machines in a network: addresses, join tokens, interfaces, and how to find a server."""
