"""What a trained backbone looks at: its receptive field, and its scan as attention."""
