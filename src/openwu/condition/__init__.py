"""Condition encoders: what a request says and shows -> the tokens that the parameter generator reads."""

ENCODERS: dict[str, str] = {"embedded": "openwu.condition.embedded:EmbeddedConditionEncoder"}
"""Name -> "module:Class". One line adds an encoder."""
