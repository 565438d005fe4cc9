"""Images, from disk to the device: `sources`, `decode` and `pipeline` on the host, `augment` on the device."""
