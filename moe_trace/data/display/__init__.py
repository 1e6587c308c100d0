"""Output formats shared by all renderers: columns, tables, CSV, JSON, colours, notebook display."""
