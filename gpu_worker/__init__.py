"""The side that works: one process per GPU, a guardian and a trainer per attempt."""
