"""Placeholder."""


def load_pretrained(model, init_cfg):
    raise NotImplementedError
