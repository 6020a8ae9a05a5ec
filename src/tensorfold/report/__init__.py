"""One self-contained HTML page about model directories: what is known of each, as charts and tables."""
