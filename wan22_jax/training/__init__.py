"""The optimizer, the train step and what it reports."""
