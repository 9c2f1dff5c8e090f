"""Every test here looks for what it left behind."""

from leftovers import nothing_left_over, runtime_folders, wait_until, workspace

__all__ = ["nothing_left_over", "runtime_folders", "wait_until", "workspace"]
