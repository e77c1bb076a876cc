"""Convolutions of channel-last maps."""
