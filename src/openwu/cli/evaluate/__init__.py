"""`openwu eval`: its arguments (options.py), its stages and measurements (run.py), and the one report (report.py)."""
