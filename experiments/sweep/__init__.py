"""Sweeps as data, runs that cannot be lost: grids, the store, the executors."""
