"""A parameter server for PyTorch over ZeroMQ.

Training is a log of updates: the server decides what enters the log, and every replica that applies
it holds the same model. This package is the server and what both sides share; the workers and the
observer live in `workers`.
"""

__version__ = "0.1.0"
