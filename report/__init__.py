"""Tables and Pareto figures from the records of finished runs."""

from report.methods import family, method_order
from report.pareto import dominated
from report.plots import pareto_figure, published_figure
from report.published import load_curves, load_published
from report.summary import Group, Reported, group_records, read_records, summarise
from report.tables import to_csv, to_latex, to_markdown

__all__ = [
    "Group",
    "Reported",
    "dominated",
    "family",
    "group_records",
    "load_curves",
    "load_published",
    "method_order",
    "pareto_figure",
    "published_figure",
    "read_records",
    "summarise",
    "to_csv",
    "to_latex",
    "to_markdown",
]
