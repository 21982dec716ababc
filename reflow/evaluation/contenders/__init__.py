"""Who is compared: pipelines of any make and the students of a run, all drawn through one interface."""
