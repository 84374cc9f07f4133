"""Estimates the resources of training runs on other hardware."""
