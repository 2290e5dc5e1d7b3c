"""Training steps compiled for devices that this machine lacks, and what they cost there."""
