"""One module per sub-command: its arguments, its help, and the call that does the work."""
