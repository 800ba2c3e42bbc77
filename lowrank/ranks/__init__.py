"""From perplexity to a table, from a table and a budget to ranks."""
