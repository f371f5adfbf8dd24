"""The machines of a cluster, from one keyboard: start, watch and stop a run on them, and find out
what their cables carry.

`hosts` and `interfaces` say what the machines are, `plan` which commands are run there, `findings`
what is wrong with them; these decide and do nothing. `remote`, `machine` and `speed` do.
"""
