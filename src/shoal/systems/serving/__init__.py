"""Systems that serve models and what clients send to them."""
