"""Files that are written whole or not at all, and readers that check before they read."""
