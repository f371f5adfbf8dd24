"""Who belongs, which round is open, when it closes and why: pure decisions."""
