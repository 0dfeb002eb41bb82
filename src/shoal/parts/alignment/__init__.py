"""Hidden units of one network put into the order of another one's."""
