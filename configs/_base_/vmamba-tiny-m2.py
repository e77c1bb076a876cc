"""VMamba-T with Mamba-2 blocks: what its configs share. No weights are published."""

vmamba = dict(arch='tiny-m2', channels=[96, 192, 384, 768], num_features=768)
