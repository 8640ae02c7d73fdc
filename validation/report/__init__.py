"""The ledger in a terminal and as one page."""

from validation.report.page import write_page
from validation.report.terminal import show_claim, show_ledger

__all__ = ["show_claim", "show_ledger", "write_page"]
