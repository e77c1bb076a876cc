"""The layers around the scan whose kernels do more than one of torch's: norms, linear layers, convolutions."""
