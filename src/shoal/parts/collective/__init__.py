"""Collective operations of a group whose members come and go."""
