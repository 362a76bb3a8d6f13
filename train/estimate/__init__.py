"""What a run takes before any GPU is touched: memory by component, and time from a measured calibration."""
