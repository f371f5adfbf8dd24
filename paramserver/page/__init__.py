"""The page: a run in a browser, served by a process of its own, and its report as one file."""
