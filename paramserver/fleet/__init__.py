"""The machines of a cluster, from one keyboard: start, watch and stop a run on them, and measure
the links between them.

`commands`, `findings` and `topology` are pure: they make the commands, find faults and draw.
`remote`, `supervisor`, `agent` and `speed` act.
"""
