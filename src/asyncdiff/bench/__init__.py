"""Measuring: time, traffic, memory, picture difference. What the commands print comes from here."""
