"""Learning from data that nobody else may see."""
