"""Recipe files and what reads them."""
