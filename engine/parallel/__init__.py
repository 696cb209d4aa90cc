"""Who holds what, and who talks to whom."""
