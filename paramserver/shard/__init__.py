"""A shard: a process beside a worker that averages some buckets in place of the server."""
