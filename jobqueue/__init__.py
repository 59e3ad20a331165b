"""What a job is, where it is kept and how it moves: what the command line and the workers both call."""
