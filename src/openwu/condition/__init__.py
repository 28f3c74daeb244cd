"""Condition encoders: what a request says and shows -> the tokens that the parameter generator reads."""
