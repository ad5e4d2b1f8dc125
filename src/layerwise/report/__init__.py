"""Reports: what ran, written for people to read."""
