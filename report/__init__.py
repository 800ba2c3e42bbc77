"""Tables, Pareto figures and one page from the records of finished runs."""
