"""Routes, the experts of each token: their columns, what is asked for, and the file that keeps them."""
