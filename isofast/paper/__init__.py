"""The paper's tables, figures and toy networks."""
