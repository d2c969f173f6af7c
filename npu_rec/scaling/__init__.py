"""Scaling studies: sweeps over configurations, fits of scaling laws, plots and a report."""
