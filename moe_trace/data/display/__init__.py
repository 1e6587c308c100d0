"""Output shared by all renderers: columns, tables, CSV, JSON, colours, notebooks."""
