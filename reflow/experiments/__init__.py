"""One module for each figure or table that the project reproduces, and the training of the digits teacher."""
