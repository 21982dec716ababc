"""Comparing few-step models of any make: what is asked for, samples on disk, measures, the result and its page."""
