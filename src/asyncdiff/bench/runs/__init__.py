"""`asyncdiff bench`: whole runs in order and in several configurations, measured side by side, and their
report."""
