"""Measurements side by side with other systems; README.md has the rules. Part of the source tree, not of the wheel."""
