"""Models raced and tried on engines, and what may be said of their times."""
