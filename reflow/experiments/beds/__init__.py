"""Beds: data and a teacher on which a claim can be decided, students that train there, and what is measured of them."""

SHORT = {"samples": 100, "steps": 40}  # of a reference in the quick form of an experiment
