"""The server: it carries out what `paramserver.rounds` decides."""
