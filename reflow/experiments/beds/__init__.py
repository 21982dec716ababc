"""Beds: data and a teacher on which a claim can be decided, students that train there, and what is measured of them."""
