"""The version, readable without importing torch: setup reads this file while it builds."""

__version__ = "0.1.0"
