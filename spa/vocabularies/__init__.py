"""Vocabularies: which ids stay, and all that follows from it."""
