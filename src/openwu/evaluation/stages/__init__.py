"""Evaluation in three resumable stages over one record: run an editor, judge its pictures, report."""
