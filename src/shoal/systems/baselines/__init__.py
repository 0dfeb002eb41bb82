"""The methods that every family compares with."""
