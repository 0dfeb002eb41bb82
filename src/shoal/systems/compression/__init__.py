"""Fewer bytes for the same learning."""
