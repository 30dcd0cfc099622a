"""What goes: coordinates chosen under the user's wishes, written down as a plan, and removed."""
