"""Whom to listen to, and for which classes: models judged by distance and by own tests."""
