"""`openwu edit`: find the photos (find.py), plan every output (plan.py), edit one by one (run.py), report (report.py)."""
