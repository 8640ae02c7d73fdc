"""Commands of `python -m experiments`; each module has a function `command`."""
