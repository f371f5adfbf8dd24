"""The replica that pushes nothing: it evaluates, writes checkpoints and logs."""
