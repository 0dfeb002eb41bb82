"""Coded computing: work spread so that results of stragglers can be done without."""
