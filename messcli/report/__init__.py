"""`report`: where the promise stands, what was saved and how far the estimates can be trusted.

read      a state or an output file
numbers   what is made of it
text      the report in lines
page      the report as one HTML page
"""

from messcli.report.numbers import Report
from messcli.report.read import make_report

__all__ = ["Report", "make_report"]
