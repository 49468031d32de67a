"""The front end in the form of `torch.optim`."""
