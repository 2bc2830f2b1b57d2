"""What is said, by what it is about."""
