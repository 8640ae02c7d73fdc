"""Diagonals of one linearised batch: by matrix recursion, forward products, signs over the sites, double backward."""
