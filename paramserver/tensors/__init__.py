"""The exchanged vector: its buckets, codecs and sums."""
