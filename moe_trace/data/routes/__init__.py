"""Routes, the experts of each token: columns, options and file format."""
