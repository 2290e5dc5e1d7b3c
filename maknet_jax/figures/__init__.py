"""Pictures, charts and HTML pages, drawn from arrays and plain values."""
