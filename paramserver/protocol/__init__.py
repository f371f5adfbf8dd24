"""The protocol: its messages, and how far a sender may run ahead."""
