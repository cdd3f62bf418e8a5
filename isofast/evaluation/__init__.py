"""Evaluation and reports of finished or stopped runs, and export of their encoders."""
