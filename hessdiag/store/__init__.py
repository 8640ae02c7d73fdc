"""What lies in files that somebody else may have written: zip archives, pickles, states of interrupted work."""
