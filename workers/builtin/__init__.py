"""The built-in training: models, data and loop that the settings name."""
