"""Several runs and evaluations side by side: what each is, which of their numbers may stand in one column, tables and the page."""
