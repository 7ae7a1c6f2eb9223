"""What is published on the Hub, and its cards."""
