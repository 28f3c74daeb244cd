"""`openwu edit`: find photos (find.py), plan their outputs (plan.py), edit one by one (run.py), report (report.py)."""
