"""Figures 1-7 and Tables 1-2 of the paper from stored results, and what it lacks."""
