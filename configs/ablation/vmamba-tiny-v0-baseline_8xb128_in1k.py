_base_ = './_base_/vmamba-tiny-v0.py'
