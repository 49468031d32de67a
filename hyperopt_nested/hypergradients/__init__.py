"""Derivatives of losses with respect to hyper-parameters, through whole runs of training."""
