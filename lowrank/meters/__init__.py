"""Memory and operations, as measured and by formula."""
