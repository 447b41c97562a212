"""HTTP: one file per noun, its `ROUTES` at the end."""
