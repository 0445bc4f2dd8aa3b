"""What is done and why, for people to read."""
