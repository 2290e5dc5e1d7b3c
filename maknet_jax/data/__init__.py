"""CT files, records and batches: NumPy on the host, and what runs on them on the device."""
