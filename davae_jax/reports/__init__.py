"""Renders HTML reports and SVG charts."""
