"""What the tools of tools/analysis and tools/export share."""
