"""Measures of a trained model's quality."""
