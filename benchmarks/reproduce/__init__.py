"""The evidence of `docs/results`: robust fine-tuning on real data, by the protocol there. Run it by `make reproduce`."""
