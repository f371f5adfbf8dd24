"""What a run does and why it is as fast as it is, as one value for everything that shows it."""
