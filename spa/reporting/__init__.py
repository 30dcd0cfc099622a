"""Reports in files, for people: one dictionary of plain data, written as HTML, Markdown or JSON.

    result, options, times, quality --report_data--> dictionary --as_html | as_markdown | as_json--> text

The writers read the dictionary alone, so what is in one file is in all three.
"""

from spa.reporting.data import report_data
from spa.reporting.files import check_report, write_report

__all__ = ["check_report", "report_data", "write_report"]
