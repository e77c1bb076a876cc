"""VMamba-B with Mamba-2 blocks: what its configs share. No weights are published."""

vmamba = dict(arch='base-m2', channels=[128, 256, 512, 1024], num_features=1024)
