"""The command `loraq`."""
