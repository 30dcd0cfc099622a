"""Results as tables for people and as plain data for JSON. Nothing is computed here."""
