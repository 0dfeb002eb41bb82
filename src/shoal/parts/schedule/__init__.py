"""When peers act that keep no common rounds."""
