"""Who is there, and whom to talk to, when nobody keeps a list for all."""
