"""How frames and memory travel between processes: sockets, handshakes, shared memory."""
